/*
 * Freeing inodes with many blocks in steps, after they have lost their last name.
 *
 * They are on the orphan list, so recovery frees them after a crash. Other inodes on that list are still in use, so
 * img->doomed records which ones are to be freed. The thread that calls x3_wait() again and again frees them, one
 * operation at a time; so do an operation that finds no space, and x3_suspend(). x3_close() frees everything on the
 * list. x3_facts() counts their blocks as free at once.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <time.h>

#include "internal.h"

#define OPERATIONS_MAX 64 /* in a row, for an operation that needs space */

/* Let other threads take the lock: a mutex is not fair. */
void let_others(void)
{
	nanosleep(&(struct timespec){ .tv_nsec = 50000 }, NULL);
}

/* Record that an inode on the orphan list is to be freed. Under the lock. */
void doom(x3_image *img, uint32_t ino, uint64_t blocks)
{
	struct doomed *more = try_grow(img->doomed, &img->doomed_cap, img->ndoomed + 1, sizeof *more);

	if (!more)
		return; /* x3_close() frees it */
	img->doomed = more;
	img->doomed[img->ndoomed++] = (struct doomed){ ino, blocks };
	img->doomed_blocks += blocks;
	pthread_cond_broadcast(&img->wake);
}

/* Set how many blocks the last recorded inode still has; *gone*: it is freed. */
static void count_left(x3_image *img, uint64_t blocks, bool gone)
{
	struct doomed *last = &img->doomed[img->ndoomed - 1];

	img->doomed_blocks -= last->blocks - min(blocks, last->blocks);
	last->blocks = min(blocks, last->blocks);
	img->ndoomed -= gone;
}

/* Free a part of one recorded inode. False: there is none. */
bool doomed_free_some(x3_image *img)
{
	GO_ON (img) {
		op.result = img->ndoomed > 0;
		if (op.result) {
			bool gone = inode_delete_some(img, img->doomed[img->ndoomed - 1].ino, true);
			count_left(img, gone ? 0 : op.rest, gone);
		}
	}
	bool dropped = op.error && img->ndoomed; /* nothing was freed: x3_close() or e2fsck does it */
	if (dropped)
		count_left(img, 0, true);
	return op_finish(&op) > 0 || dropped;
}

/*
 * Free enough blocks of the recorded inodes for any single operation. Under the lock, which is dropped meanwhile.
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
