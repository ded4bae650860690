/* Arrays of block pointers: shared by data.c, which fills them, and free_data.c, which empties them. */
#ifndef COWFS_EXT3_BLOCK_MAP_H
#define COWFS_EXT3_BLOCK_MAP_H

#include "internal.h"

#define CHANGES_MAX 400u /* changes of metadata after which an operation writes or frees no more */

/* A row of block pointers: from one of them to the end of its array. */
struct slots {
	struct block *block; /* the block that contains them; NULL: the array does not exist */
	uint32_t offset;
	uint64_t count; /* number of pointers; without a block: number of logical blocks that are holes */
};

static inline uint32_t *slot(const struct slots *s, uint64_t i)
{
	/* Without a block, the pointer is not used. NOLINTNEXTLINE(clang-analyzer-core.NullPointerArithm) */
	return (uint32_t *)(s->block->data + s->offset) + i;
}

/* The pointer number *i* in the inode itself. */
static inline struct slots inode_slots(const struct inode *in, uint32_t i)
{
	return (struct slots){ in->block, in->offset + offsetof(struct ext2_inode_large, i_block[0]) + 4 * i, 12 - i };
}

/* How many of the first *most* pointers name adjacent blocks, or are all 0. */
static inline uint32_t run_length(const struct slots *s, uint64_t most)
{
	const uint32_t *p = slot(s, 0);
	uint32_t n = 1;

	most = min(most, s->count);
	while (n < most && p[n] == (p[0] ? p[0] + n : 0))
		n++;
	return n;
}

struct block *map_indirect(x3_image *img, uint32_t nr);
void need_regular(x3_image *img, const struct inode *in);
void data_zero(x3_image *img, struct inode *in, uint64_t off, uint64_t len);
void data_zero_tail(x3_image *img, struct inode *in, uint64_t size, uint64_t end);

#endif
