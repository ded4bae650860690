/*
 * Block pointers, and the data of regular files.
 *
 * i_block[] has 12 pointers to data and one each to an indirect, a double and a triple indirect block. File
 * data never enters the cache: it goes to the image's file at once, in place or into blocks that no committed
 * transaction uses yet.
 */

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "internal.h"
#include "block_map.h"

const char zero[BLOCK_MAX];

#define WRITE_MAX (4u << 20)   /* bytes that one operation writes at most */
#define EXTENTS_MAX (1u << 16) /* extents that one operation examines: others wait */

/*
 * The largest file, as in fs/ext4/super.c (ext4_max_bitmap_size): limited by the pointers, and by i_blocks,
 * which counts all its blocks, those with pointers too, in units of 512 bytes.
 */
uint64_t data_size_max(uint32_t bits)
{
	uint64_t per = 1ull << (bits - 2), all = 12 + per + per * per + per * per * per;
	uint64_t most = ((1ull << 32) - 1) >> (bits - 9), left = most - 12 - per, meta = 1;

	if (all + 3 + 2 * per + per * per <= most)
		return all << bits;
	if (left < per * per) {
		meta += 1 + (left + per - 1) / per;
	} else {
		left -= per * per;
		meta += 1 + per + 1 + (left + per - 1) / per + (left + per * per - 1) / (per * per);
	}
	return (most - meta) << bits;
}

/* An indirect block. */
struct block *map_indirect(x3_image *img, uint32_t nr)
{
	check_block(img, nr, 1);
	return block_get(img, nr);
}

/*
 * Find the pointer to logical block *at*. With *goal* make missing indirect blocks, near it; false: there is
 * no room for one.
 */
static bool find_slots(x3_image *img, struct inode *in, uint64_t at, uint32_t goal, struct slots *s)
{
	uint32_t per = img->bs / 4, depth = 1, got;
	uint64_t span = per;

	if (at < 12) {
		*s = inode_slots(in, at);
		return true;
	}
	for (at -= 12; at >= span && depth < 3; depth++) {
		at -= span;
		span *= per;
	}
	if (at >= span)
		fail(img, EFBIG, "too large a file");
	*s = inode_slots(in, 11 + depth);
	for (; depth; depth--) {
		uint32_t nr = *slot(s, 0);
		if (!nr && !goal) {
			*s = (struct slots){ .count = span - at };
			return true;
		}
		if (nr) {
			s->block = map_indirect(img, nr);
		} else {
			nr = alloc_blocks(img, goal, 1, &got);
			if (!nr)
				return false;
			*(uint32_t *)block_change(img, s->block, s->offset, 4) = nr;
			s->block = block_fresh(img, nr);
			inode_add_blocks(img, in, 1);
		}
		span /= per;
		s->offset = at / span * 4;
		s->count = per - at / span;
		at %= span;
	}
	return true;
}

/*
 * The mapping of logical block *at*, and of as many of the *most* blocks after it as are adjacent (or are
 * holes too).
 */
struct extent data_map(x3_image *img, const struct inode *in, uint64_t at, uint64_t most)
{
	struct slots s;
	struct extent e = { .at = at };

	find_slots(img, (struct inode *)in, at, 0, &s);
	if (!s.block) {
		e.count = min(min(most, s.count), 0x40000000u);
		return e;
	}
	e.count = run_length(&s, most);
	e.nr = *slot(&s, 0);
	if (e.nr)
		check_block(img, e.nr, e.count);
	return e;
}

/* The best place for the next block of a file: behind the one before it, or in the inode's group. */
static uint32_t find_goal(x3_image *img, struct inode *in, uint64_t at)
{
	uint32_t nr = at ? data_map(img, in, at - 1, 1).nr : 0;

	return nr ? nr + 1 : inode_goal(img, in->ino);
}

/* Give the inode, which is being changed, a metadata block (of a directory or symlink) at a hole. ENOSPC. */
struct block *data_append_meta(x3_image *img, struct inode *in, uint64_t at)
{
	uint32_t nr = alloc_block(img, find_goal(img, in, at));
	struct slots s;

	if (!find_slots(img, in, at, nr + 1, &s))
		fail(img, ENOSPC, "full");
	*(uint32_t *)block_change(img, s.block, s.offset, 4) = nr;
	inode_add_blocks(img, in, 1);
	return block_fresh(img, nr);
}

void need_regular(x3_image *img, const struct inode *in)
{
	if (!S_ISREG(in->raw->i_mode))
		fail(img, S_ISDIR(in->raw->i_mode) ? EISDIR : EINVAL, "not a regular file");
}


/* --- reading --- */

/* The extents of a part of a file: mapped under the lock, read without it. */
struct plan {
	struct extent extent[32];
	uint32_t n;
	uint64_t end; /* where the plan, or the file, ends */
	bool done;
};

static void plan_read(x3_image *img, uint32_t ino, uint64_t off, uint64_t end, struct plan *plan)
{
	struct inode in = inode_get(img, ino);
	uint64_t at = off >> img->bits, stop;

	need_regular(img, &in);
	end = min(end, inode_size_of(&in));
	stop = (end + img->bs - 1) >> img->bits;
	for (plan->n = 0; off < end && at < stop && plan->n < 32; at += plan->extent[plan->n++].count)
		plan->extent[plan->n] = data_map(img, &in, at, stop - at);
	plan->end = off < end ? min(end, at << img->bits) : off;
}

static int carry_out(x3_image *img, const struct plan *plan, char *buf, uint64_t off)
{
	for (uint32_t i = 0; i < plan->n; i++) {
		const struct extent *e = &plan->extent[i];
		uint64_t start = max(off, e->at << img->bits);
		uint64_t stop = min(plan->end, (e->at + e->count) << img->bits);
		int error = 0;
		if (e->nr)
			error = io_read(img, buf + (start - off), stop - start,
					((uint64_t)e->nr << img->bits) + start - (e->at << img->bits));
		else
			memset(buf + (start - off), 0, stop - start);
		if (error)
			return error;
	}
	return 0;
}

/* Without the lock: other operations continue, but freed blocks are not reused meanwhile. */
static int64_t read_some(x3_image *img, uint32_t ino, char *buf, uint64_t off, uint64_t end)
{
	struct plan plan;
	int64_t result;
	int error;

	QUERY (img) {
		plan_read(img, ino, off, end, &plan);
		/* A commit waits for existing readers: do not be one. Nor let anything change that is not
		 * home. */
		plan.done = img->draining || (img->patches.n && !img->read_only);
		if (plan.done && (error = carry_out(img, &plan, buf, off)))
			fail(img, -error, "file data cannot be read");
		img->readers += !plan.done;
	}
	result = op_finish(&op);
	if (result < 0)
		return result;
	/* It was set, or the result is an error. NOLINTNEXTLINE(clang-analyzer-core.uninitialized.Branch) */
	if (!plan.done) {
		error = carry_out(img, &plan, buf, off);
		pthread_mutex_lock(&img->lock);
		if (--img->readers == 0 && img->draining)
			pthread_cond_broadcast(&img->wake);
		pthread_mutex_unlock(&img->lock);
		if (error)
			return error;
	}
	return plan.end - off;
}

int64_t x3_read(x3_image *img, uint32_t ino, void *buf, uint64_t len, uint64_t off)
{
	uint64_t done = 0;

	len = min(len, (uint64_t)INT64_MAX - min(off, (uint64_t)INT64_MAX));
	for (;;) {
		int64_t n = read_some(img, ino, (char *)buf + done, off + done, off + len);
		if (n < 0)
			return done ? (int64_t)done : n;
		done += n;
		if (!n || done == len)
			return done;
	}
}

/* The next run of data at or behind *from*, or as much of it as one operation should examine; ENXIO. */
int64_t data_segment(x3_image *img, uint32_t ino, uint64_t from, uint64_t *stop)
{
	struct inode in = inode_get(img, ino);
	uint64_t size = inode_size_of(&in), at = from >> img->bits, end = (size + img->bs - 1) >> img->bits;
	uint32_t steps = 0;
	struct extent e;

	need_regular(img, &in);
	for (; at < end && steps < EXTENTS_MAX;
	     at += e.count, steps++) { /* at most this many holes; after more, report data */
		e = data_map(img, &in, at, end - at);
		if (e.nr)
			break;
	}
	if (from >= size || at >= end)
		fail(img, ENXIO, "no more data");
	from = max(from, at << img->bits);
	for (steps = 0; at < end && steps < EXTENTS_MAX; at += e.count, steps++) {
		e = data_map(img, &in, at, end - at);
		if (!e.nr)
			break;
	}
	*stop = min(size, at << img->bits);
	return from;
}


/* --- writing --- */

/* Write blocks that the file already has: from byte *skip* of block *nr* on. */
static int write_old(x3_image *img, uint32_t ino, uint32_t nr, uint32_t skip, const char *buf, uint64_t len)
{
	struct iovec iov = { (void *)buf, len };

	return unsynced_write(img, ino, &iov, 1, ((uint64_t)nr << img->bits) + skip);
}

/* The same for new blocks: zero what is not written in the first and the last. */
static int write_new(x3_image *img, uint32_t ino, uint32_t nr, uint32_t skip, const char *buf, uint64_t len)
{
	struct iovec iov[3] = {
		{ (void *)zero, skip },
		{ (void *)buf, len },
		{ (void *)zero, -(skip + len) & (img->bs - 1) },
	};

	return unsynced_write(img, ino, iov, 3, (uint64_t)nr << img->bits);
}

/*
 * Zero the last block of the file from *size* on, up to *end* at most.
 *
 * It was zero when the file got that size, but since then a write that a crash undid may have changed it.
 */
void data_zero_tail(x3_image *img, struct inode *in, uint64_t size, uint64_t end)
{
	uint32_t skip = size & (img->bs - 1);
	struct extent e = { 0 };
	int error;

	if (skip && end > size)
		e = data_map(img, in, size >> img->bits, 1);
	if (!e.nr)
		return;
	error = write_old(img, in->ino, e.nr, skip, zero, min(end - size, (uint64_t)img->bs - skip));
	if (error)
		fail(img, -error, "file data cannot be written: %s", strerror(-error));
}

/* Zero *len* bytes at *off*, all in one block, if that is there. */
void data_zero(x3_image *img, struct inode *in, uint64_t off, uint64_t len)
{
	struct extent e = data_map(img, in, off >> img->bits, 1);
	int error = e.nr && len ? write_old(img, in->ino, e.nr, off & (img->bs - 1), zero, len) : 0;

	if (error)
		fail(img, -error, "file data cannot be written: %s", strerror(-error));
}

/* Allocate up to *want* blocks for the hole at *at*, all in one array of pointers; 0: no space. */
static uint32_t fill_hole(x3_image *img, struct inode *in, uint64_t at, uint32_t goal, uint32_t want, uint32_t *nr)
{
	struct mark mark = undo_mark(img);
	struct slots s;
	uint32_t got, *p;

	block_change(img, in->block, in->offset, img->inode_size); /* i_blocks, for undo_to() */
	*nr = alloc_blocks(img, goal, want, &got);
	if (!*nr)
		return 0;
	if (!find_slots(img, in, at, *nr + got, &s)) {
		undo_to(img, mark);
		return 0;
	}
	p = block_change(img, s.block, s.offset, 4 * got);
	for (uint32_t i = 0; i < got; i++) {
		p[i] = *nr + i;
		block_forget(img, *nr + i);
	}
	inode_add_blocks(img, in, got);
	return got;
}

/*
 * The same for the rest of a write: a part of the data is written already, perhaps in place, and stays. So a
 * disk without room for a metadata block ends the write, but not the operation.
 */
static uint32_t fill_hole_if_any(x3_image *img, struct inode *in, uint64_t at, uint32_t goal, uint32_t want,
				 uint32_t *nr)
{
	struct mark mark = undo_mark(img);
	struct op *op = img->op;
	jmp_buf outer;
	uint32_t got;

	memcpy(outer, op->escape, sizeof outer);
	if (setjmp(op->escape) == 0) {
		got = fill_hole(img, in, at, goal ? goal : find_goal(img, in, at), want, nr);
		memcpy(op->escape, outer, sizeof outer);
		return got;
	}
	memcpy(op->escape, outer, sizeof outer);
	if (!room_is_lacking(-op->error))
		longjmp(op->escape, 1);
	op->error = 0;
	undo_to(img, mark);
	return 0;
}

/* How many blocks from *at* on have their pointers in the same array. */
static uint64_t array_left(const x3_image *img, uint64_t at)
{
	uint32_t per = img->bs / 4;

	return at < 12 ? 12 - at : per - (at - 12) % per;
}

/* How much of *len* bytes one operation writes at most; 0 if *holes* begin behind the end of the file. */
static uint64_t write_limit(x3_image *img, const struct inode *in, uint64_t len, uint64_t off, bool holes)
{
	need_regular(img, in);
	if (holes && off >= inode_size_of(in))
		return 0;
	if (holes && (off & (img->bs - 1)))
		fail(img, EINVAL, "a part of a block cannot be filled");
	if (off >= img->size_max)
		fail(img, EFBIG, "too large a file");
	len = min(len, (holes ? inode_size_of(in) : img->size_max) - off);
	return min(len, WRITE_MAX - (off & (img->bs - 1)));
}

/*
 * Write up to *len* bytes in one operation; return how many. ENOSPC if there is room for none.
 *
 * With *holes* write only into holes, and leave existing blocks, the size and the times alone.
 */
uint64_t data_write(x3_image *img, uint32_t ino, const char *buf, uint64_t len, uint64_t off, bool holes)
{
	struct inode in = inode_change(img, ino, false);
	uint64_t done = 0, end, limit;
	uint32_t goal = 0, nr, skip, n;
	bool fresh = false;

	limit = write_limit(img, &in, len, off, holes);
	if (holes && !limit)
		return len;
	len = limit;
	if (!holes)
		leave_some(img, len >> img->bits);
	if (off > inode_size_of(&in))
		data_zero_tail(img, &in, inode_size_of(&in), off);
	while (done < len && !(done && img->undo.n > CHANGES_MAX)) {
		uint64_t at = (off + done) >> img->bits, left;
		struct mark mark = undo_mark(img);
		int error;
		skip = (off + done) & (img->bs - 1);
		left = (skip + len - done + img->bs - 1) >> img->bits;
		struct extent e = data_map(img, &in, at, left);
		nr = e.nr;
		n = e.count;
		if (nr && fresh && !holes)
			break; /* if the new blocks are undone, nothing behind them may be written in place */
		if (!nr) {
			n = min(n, array_left(img, at));
			if (done)
				n = fill_hole_if_any(img, &in, at, goal, n, &nr);
			else
				n = fill_hole(img, &in, at, find_goal(img, &in, at), n, &nr);
			if (!n)
				break;
		}
		end = min(len, done + ((uint64_t)n << img->bits) - skip);
		error = 0;
		if (!e.nr)
			error = write_new(img, ino, nr, skip, buf + done, end - done);
		else if (!holes)
			error = write_old(img, ino, nr, skip, buf + done, end - done);
		if (error && !done)
			fail(img, -error, "file data cannot be written: %s", strerror(-error));
		if (error) { /* what has been written, in place perhaps, stays */
			undo_to(img, mark);
			break;
		}
		goal = nr + n;
		done = end;
		fresh |= !e.nr;
	}
	if (!done && len)
		fail(img, ENOSPC, "full");
	if (holes)
		return done;
	if (off + done > inode_size_of(&in))
		inode_set_size(img, &in, off + done);
	inode_times(img, &in, X3_MTIME | CTIME, now_ns());
	return done;
}
