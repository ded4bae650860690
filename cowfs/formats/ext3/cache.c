/*
 * The cache of metadata blocks, and the undo of what an operation has changed in them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* Make room for *need* elements in an array; NULL if there is no memory (the array is as it was). */
void *try_grow(void *array, size_t *cap, size_t need, size_t size)
{
	size_t more = *cap ? *cap : 64;

	if (need <= *cap)
		return array;
	while (more < need)
		more *= 2;
	/* The caller still has the old array. NOLINTNEXTLINE(bugprone-suspicious-realloc-usage) */
	array = realloc(array, more * size);
	if (array)
		*cap = more;
	return array;
}

void *grow(x3_image *img, void *array, size_t *cap, size_t need, size_t size)
{
	array = try_grow(array, cap, need, size);
	if (!array)
		fail(img, ENOMEM, "no memory");
	return array;
}

static struct block **bucket_of(x3_image *img, uint32_t nr)
{
	return &img->bucket[(nr * 2654435761u >> 7) & img->bucket_mask];
}

/* The block, if it is in the cache. */
struct block *block_find(x3_image *img, uint32_t nr)
{
	struct block *b = *bucket_of(img, nr);

	while (b && b->nr != nr)
		b = b->next;
	return b;
}

/* Add a block, whose content is still undefined. */
static struct block *cache_add(x3_image *img, uint32_t nr)
{
	struct block **bucket = bucket_of(img, nr);
	struct block *b;

	img->all = grow(img, img->all, &img->cached_cap, img->cached + 1, sizeof *img->all);
	b = malloc(sizeof *b + img->bs);
	if (!b)
		fail(img, ENOMEM, "no memory");
	*b = (struct block){ .nr = nr, .flags = USED, .next = *bucket };
	*bucket = b;
	img->all[img->cached++] = b;
	return b;
}

/* Remove the block at *index* of img->all from the cache. */
static void cache_remove(x3_image *img, size_t index)
{
	struct block *b = img->all[index], **link = bucket_of(img, b->nr);

	while (*link != b)
		link = &(*link)->next;
	*link = b->next;
	img->all[index] = img->all[--img->cached];
	free(b->logged);
	free(b);
}

/* Between operations: move the clock's hand until the cache is within its bounds. */
void cache_trim(x3_image *img)
{
	size_t steps = 256;

	while (img->cached > img->cached_max && steps--) {
		if (img->hand >= img->cached)
			img->hand = 0;
		struct block *b = img->all[img->hand];
		if (b->flags & ~(USED | HAS_ROOM))
			img->hand++;
		else if (b->flags & USED)
			b->flags &= ~USED, img->hand++;
		else
			cache_remove(img, img->hand);
	}
}

/* Between operations: drop all blocks that are the same as on disk. */
void x3_shrink(x3_image *img)
{
	pthread_mutex_lock(&img->lock);
	for (size_t i = is_suspended(img) ? 0 : img->cached; i--;)
		if (!(img->all[i]->flags & ~(USED | HAS_ROOM)))
			cache_remove(img, i);
	img->hand = 0;
	pthread_mutex_unlock(&img->lock);
}

void cache_free(x3_image *img)
{
	while (img->cached)
		cache_remove(img, img->cached - 1);
	free(img->all);
	free(img->bucket);
	free(img->undo.change);
	free(img->undo.bytes);
	img->all = img->bucket = NULL;
	img->cached_cap = img->hand = 0;
	memset(&img->undo, 0, sizeof img->undo);
}

/* A metadata block, from the cache or the file. */
struct block *block_get(x3_image *img, uint32_t nr)
{
	struct block *b = block_find(img, nr);
	int error;

	if (b) {
		img->hits++;
	} else {
		img->misses++;
		if (nr >= img->blocks)
			fail(img, EUCLEAN, "block %u is outside the filesystem", nr);
		b = cache_add(img, nr);
		error = io_read(img, b->data, img->bs, (uint64_t)nr << img->bits);
		if (error) {
			cache_remove(img, img->cached - 1);
			fail(img, -error, "block %u cannot be read", nr);
		}
	}
	b->flags |= USED;
	return b;
}

/* Add a record to the undo. */
static struct change *undo_push(x3_image *img, struct block *b)
{
	img->undo.change = grow(img, img->undo.change, &img->undo.cap, img->undo.n + 1, sizeof *img->undo.change);
	img->undo.change[img->undo.n] = (struct change){ .block = b, .old = img->undo.used };
	return &img->undo.change[img->undo.n++];
}

/* Add a block to the running transaction, before its bytes are changed. */
static void make_dirty(x3_image *img, struct block *b)
{
	if (b->flags & DIRTY)
		return;
	room_for(img, b);
	/* The checkpoint still needs what the log has. (What is being logged is in img->log.) */
	if ((b->flags & (LOGGED | LOGGING)) == LOGGED && !b->logged) {
		b->logged = malloc(img->bs);
		if (!b->logged)
			fail(img, ENOMEM, "no memory");
		memcpy(b->logged, b->data, img->bs);
	}
	if (!(b->flags & LISTED)) {
		img->dirty = grow(img, img->dirty, &img->dirty_cap, img->ndirty + 1, sizeof *img->dirty);
		img->dirty[img->ndirty++] = b;
	}
	b->flags |= DIRTY | LISTED;
}

/* A block that has just been allocated for metadata: all zero, and part of the running transaction. */
struct block *block_fresh(x3_image *img, uint32_t nr)
{
	struct block *b = block_find(img, nr);

	if (!b)
		b = cache_add(img, nr);
	undo_push(img, b);
	make_dirty(img, b);
	memset(b->data, 0, img->bs);
	return b;
}

/* Return where the caller may change *length* bytes of a block; the undo records the old ones. */
void *block_change(x3_image *img, struct block *b, uint32_t offset, uint32_t length)
{
	struct change *c = undo_push(img, b);

	img->undo.n--; /* it counts once it is complete */
	img->undo.bytes = grow(img, img->undo.bytes, &img->undo.size, img->undo.used + length, 1);
	make_dirty(img, b);
	memcpy(img->undo.bytes + img->undo.used, b->data + offset, length);
	c->offset = offset;
	c->length = length;
	img->undo.used += length;
	img->undo.n++;
	return b->data + offset;
}

/*
 * A block becomes file data: the log must not have it. (Blocks are held back so that it does not; in tests it
 * may.)
 */
void block_forget(x3_image *img, uint32_t nr)
{
	struct block *b = img->debug & ~(X3_OTHER_BOOT | X3_NO_MEMORY | X3_AS_NFS) ? block_find(img, nr) : NULL;

	if (b)
		b->flags = (b->flags & ~(DIRTY | LOGGING | LOGGED)) | PINNED;
}

struct mark undo_mark(const x3_image *img)
{
	return (struct mark){ img->undo.n, img->undo.used, img->held.n };
}

/* Undo what the operation has done since *mark*. */
void undo_to(x3_image *img, struct mark mark)
{
	while (img->undo.n > mark.changes) {
		struct change *c = &img->undo.change[--img->undo.n];
		if (c->length)
			memcpy(c->block->data + c->offset, img->undo.bytes + c->old, c->length);
		else
			c->block->flags &= ~DIRTY; /* free again: it must not get into the log */
	}
	img->undo.used = mark.bytes;
	held_undo(img, mark.held);
}
