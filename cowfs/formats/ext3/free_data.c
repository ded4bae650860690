/*
 * Freeing the blocks of files: truncating, and punching holes.
 *
 * Both walk from the pointers in the inode down the indirect blocks, and may need several operations.
 */

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "internal.h"
#include "block_map.h"

/* --- truncating --- */

/* Free the blocks of the first *count* pointers, in runs. The pointers do not change. */
static void free_slots(x3_image *img, struct inode *in, struct slots *s, uint32_t count)
{
	for (uint32_t n; count; count -= n, s->offset += 4 * n) {
		uint32_t nr = *slot(s, 0);
		n = run_length(s, count);
		if (nr) {
			free_blocks(img, nr, n);
			inode_add_blocks(img, in, -(int64_t)n);
		}
		s->count -= n;
	}
}

/* Free the blocks of the first *count* pointers, and clear the pointers. */
static void clear_slots(x3_image *img, struct inode *in, struct slots s, uint32_t count)
{
	uint32_t offset = s.offset;
	struct block *block = s.block;

	free_slots(img, in, &s, count);
	memset(block_change(img, block, offset, 4 * count), 0, 4 * count);
}

/* The number of data blocks below one pointer in an indirect block of this depth. */
static uint64_t span_of(const x3_image *img, int depth)
{
	uint64_t per = img->bs / 4;

	return depth == 3 ? per * per : depth == 2 ? per : 1;
}

/*
 * Free the data blocks below a pointer to an indirect block, from number *first* on, the last ones first.
 *
 * An indirect block that maps nothing any more is freed too, as in ext4_find_shared(). False: some remain for another
 * operation.
 */
static bool free_tree(x3_image *img, struct inode *in, struct slots s, int depth, uint64_t first)
{
	uint32_t per = img->bs / 4, nr = *slot(&s, 0);
	uint64_t span = span_of(img, depth);
	struct slots below = { .count = per };

	if (!nr)
		return true;
	if (img->undo.n > CHANGES_MAX)
		return false;
	below.block = map_indirect(img, nr);
	if (depth == 1) {
		below.offset = 4 * first;
		below.count = per - first;
		if (first) { /* the indirect block stays, so its pointers must be cleared */
			clear_slots(img, in, below, per - first);
			if (memcmp(below.block->data, zero, img->bs))
				return true;
		} else {
			free_slots(img, in, &below, per);
		}
	} else {
		for (uint32_t i = per; i-- > first / span;) {
			struct slots child = { below.block, 4 * i, 1 };
			if (!free_tree(img, in, child, depth - 1, i == first / span ? first % span : 0))
				return false;
		}
		if (first && memcmp(below.block->data, zero, img->bs))
			return true;
	}
	s.count = 1;
	clear_slots(img, in, s, 1);
	return true;
}

/* Free all blocks of the inode, which is being changed, from logical block *first* on. False: some remain. */
bool data_free_from(x3_image *img, struct inode *in, uint64_t first)
{
	uint64_t per = img->bs / 4, start[4] = { 0, 12, 12 + per, 12 + per + per * per };
	uint64_t span[4] = { 12, per, per * per, per * per * per };

	for (int depth = 3; depth; depth--) {
		uint64_t from = first > start[depth] ? first - start[depth] : 0;
		if (from < span[depth] && !free_tree(img, in, inode_slots(in, 11 + depth), depth, from))
			return false;
	}
	if (first < 12)
		clear_slots(img, in, inode_slots(in, first), 12 - first);
	return true;
}

/*
 * Zero the last block of a file that becomes shorter, from *size* on, after the operation has its redo record.
 *
 * If the record cannot be written, the file keeps its size and its data.
 */
static void clear_tail_late(x3_image *img, struct inode *in, uint64_t size)
{
	uint32_t skip = size & (img->bs - 1);
	struct extent e = { 0 };

	if (skip)
		e = data_map(img, in, size >> img->bits, 1);
	if (!e.nr)
		return;
	img->op->late.off = ((uint64_t)e.nr << img->bits) + skip;
	img->op->late.len = img->bs - skip;
	img->op->late.ino = in->ino;
}

/*
 * Zero the bytes recorded by clear_tail_late(), after the operation has its redo record. -EIO.
 *
 * If the disk has no space, it is done when the file grows: see data_zero_tail().
 */
int data_clear_late(x3_image *img)
{
	struct op *op = img->op;
	struct iovec iov = { (void *)zero, op->late.len };
	int error = op->late.len ? unsynced_write(img, op->late.ino, &iov, 1, op->late.off) : 0;

	if (!error || room_is_lacking(error))
		return 0;
	snprintf(img->message, sizeof img->message, "file data cannot be written: %s", strerror(-error));
	return -EIO;
}

/*
 * Set the size. False: the file is on the orphan list, and has blocks behind its end. Then call data_truncate_more()
 * until it returns true; nobody may write to the file before.
 */
bool data_truncate(x3_image *img, uint32_t ino, uint64_t size)
{
	struct inode in = inode_change(img, ino, true);
	uint64_t old = inode_size_of(&in);

	need_regular(img, &in);
	if (size > img->size_max)
		fail(img, EFBIG, "too large a file");
	if (size < old)
		clear_tail_late(img, &in, size);
	else
		data_zero_tail(img, &in, old, UINT64_MAX);
	inode_set_size(img, &in, size);
	inode_times(img, &in, X3_MTIME | CTIME, now_ns());
	if (size > old)
		return true;
	if (data_free_from(img, &in, (size + img->bs - 1) >> img->bits))
		return true;
	if (in.raw->i_links_count) /* otherwise it is already on the list */
		orphan_add(img, &in);
	return false;
}

bool data_truncate_more(x3_image *img, uint32_t ino)
{
	struct inode in = inode_change(img, ino, true);

	if (!data_free_from(img, &in, (inode_size_of(&in) + img->bs - 1) >> img->bits))
		return false;
	if (in.raw->i_links_count)
		orphan_remove(img, &in);
	return true;
}


/* --- punching holes --- */

/*
 * Free the data blocks below a pointer to an indirect block, from number *from* up to, but not including, *to*.
 *
 * An indirect block that maps nothing any more is freed too. False: some remain for another operation.
 */
static bool punch_tree(x3_image *img, struct inode *in, struct slots s, int depth, uint64_t from, uint64_t to)
{
	uint32_t per = img->bs / 4, nr = *slot(&s, 0);
	uint64_t span = span_of(img, depth);
	struct slots below = { .count = per };

	if (!nr)
		return true;
	if (img->undo.n > CHANGES_MAX)
		return false;
	below.block = map_indirect(img, nr);
	if (depth == 1) {
		below.offset = 4 * from;
		below.count = per - from;
		clear_slots(img, in, below, to - from);
	} else {
		for (uint64_t i = from / span; i * span < to; i++) {
			struct slots child = { below.block, 4 * i, 1 };
			uint64_t start = i * span;
			if (!punch_tree(img, in, child, depth - 1, max(from, start) - start, min(to - start, span)))
				return false;
		}
	}
	if (memcmp(below.block->data, zero, img->bs))
		return true;
	s.count = 1;
	clear_slots(img, in, s, 1);
	return true;
}

/* Free the blocks from number *first* up to, but not including, *last*. False: some remain. */
static bool punch_blocks(x3_image *img, struct inode *in, uint64_t first, uint64_t last)
{
	uint64_t per = img->bs / 4, span = per, start = 12;

	if (first < min(last, 12))
		clear_slots(img, in, inode_slots(in, first), min(last, 12) - first);
	for (int depth = 1; depth <= 3; depth++, start += span, span *= per) {
		uint64_t from = max(first, start) - start, to = max(min(last, start + span), start) - start;
		if (from < to && !punch_tree(img, in, inode_slots(in, 11 + depth), depth, from, to))
			return false;
	}
	return true;
}

/* Make a range a hole: free its blocks, and zero its part of other blocks. False: some blocks remain. */
bool data_punch(x3_image *img, uint32_t ino, uint64_t off, uint64_t len)
{
	struct inode in = inode_change(img, ino, true);
	uint64_t size = inode_size_of(&in), end = len < size - min(off, size) ? off + len : size;
	uint64_t mask = img->bs - 1, first = (off + mask) >> img->bits, last = end >> img->bits;

	need_regular(img, &in);
	inode_times(img, &in, X3_MTIME | CTIME, now_ns());
	if (off >= size)
		return true;
	if (end == size) /* nobody sees the part of the last block behind the end */
		last = (size + mask) >> img->bits;
	if (first > last) { /* the range is in one block */
		data_zero(img, &in, off, end - off);
		return true;
	}
	if (off & mask)
		data_zero(img, &in, off, (first << img->bits) - off);
	if (end > last << img->bits)
		data_zero(img, &in, last << img->bits, end - (last << img->bits));
	return punch_blocks(img, &in, first, last);
}
