/*
 * Inodes that have lost their last name, and have many blocks: they are freed bit by bit.
 *
 * They are on the orphan list, so after a crash the recovery frees them. Here is remembered which ones those
 * are, since others on that list are still in use. Who calls x3_wait() again and again frees them, an
 * operation at a time; so does an operation that finds no room, and x3_suspend(). x3_close() frees whatever
 * is on the list. To x3_facts() their blocks are free at once.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <time.h>

#include "internal.h"

#define OPERATIONS_MAX 64 /* in a row, for somebody who needs room */

/* Let other threads take the lock: a mutex is not fair. */
void let_others(void)
{
	nanosleep(&(struct timespec){ .tv_nsec = 50000 }, NULL);
}

/* Free an inode without a name, which is on the orphan list, soon. Under the lock. */
void doom(x3_image *img, uint32_t ino, uint64_t blocks)
{
	struct doomed *more = try_grow(img->doomed, &img->doomed_cap, img->ndoomed + 1, sizeof *more);

	if (!more)
		return; /* x3_close() will do */
	img->doomed = more;
	img->doomed[img->ndoomed++] = (struct doomed){ ino, blocks };
	img->doomed_blocks += blocks;
	pthread_cond_broadcast(&img->wake);
}

/* The last one still has this many blocks; *gone*: it has none. */
static void count_left(x3_image *img, uint64_t blocks, bool gone)
{
	struct doomed *last = &img->doomed[img->ndoomed - 1];

	img->doomed_blocks -= last->blocks - min(blocks, last->blocks);
	last->blocks = min(blocks, last->blocks);
	img->ndoomed -= gone;
}

/* Free a part of one inode. False: there is none. */
bool doomed_free_some(x3_image *img)
{
	GO_ON (img) {
		op.result = img->ndoomed > 0;
		if (op.result) {
			bool gone = inode_delete_some(img, img->doomed[img->ndoomed - 1].ino, true);
			count_left(img, gone ? 0 : op.rest, gone);
		}
	}
	bool dropped = op.error &&
		       img->ndoomed; /* nothing was: x3_close(), or whoever looks after the damage, will do */
	if (dropped)
		count_left(img, 0, true);
	return op_finish(&op) > 0 || dropped;
}

/*
 * Free enough blocks of them for any one operation, if there are any. Under the lock, which is dropped
 * meanwhile.
 */
void doomed_make_room(x3_image *img)
{
	if (!img->ndoomed)
		return;
	pthread_mutex_unlock(&img->lock);
	for (int i = 0; i < OPERATIONS_MAX && doomed_free_some(img); i++)
		;
	image_lock(img);
}
