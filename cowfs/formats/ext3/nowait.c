/*
 * Threads that must not wait for the disk.
 *
 * An operation may need a commit: freed blocks become usable only after one, and the sizes of a transaction, the
 * journal and the redo log are limited. Waiting for a commit means waiting for the disk. A thread that serves many
 * users declares that it is in a hurry (x3_hurry). It never waits for blocks: its operation fails with EAGAIN, and
 * another thread makes blocks usable (x3_relieve). It waits for the other limits only in the last resort; x3_pressed()
 * warns before. Commits are requested (img->due) long before a limit is reached.
 */
#include <errno.h>

#include "internal.h"

#define HELD_SOON 1024u /* freed blocks from which on a commit is requested */

static __thread bool hurried;

bool in_a_hurry(void)
{
	return hurried;
}

int x3_hurry(int on)
{
	bool before = hurried;

	hurried = on;
	return before;
}

/* Let the thread in x3_wait() commit what is there now. */
void ask_commit(x3_image *img)
{
	if (img->due == img->tid)
		return;
	img->due = img->tid;
	pthread_cond_broadcast(&img->wake);
}

/* Free blocks that may be used immediately. */
static uint64_t usable_blocks(const x3_image *img)
{
	uint64_t free = img->sb->s_free_blocks_count;

	return free - min(free, img->nheld);
}

/* Request a commit if a limit comes near. Call it after an operation that made a change. */
void look_ahead(x3_image *img)
{
	if (img->ndirty > img->dirty_max / 2 || img->held_now > max(usable_blocks(img), (uint64_t)HELD_SOON))
		ask_commit(img);
	img->pressed = img->ndirty > img->dirty_max / 4 * 3 || img->nlogged > img->cached_max / 8 * 3 ||
		       unsynced_is_much(img) || redo_is_much(img);
}

/*
 * Fail if a thread in a hurry would use up, with a large write of *count* blocks, the last usable ones while
 * many are held back: some must remain for small writes.
 */
void leave_some(x3_image *img, uint64_t count)
{
	uint64_t reserve = img->blocks / 64;

	if (!hurried || count < 16 || img->nheld < reserve || usable_blocks(img) >= reserve + count)
		return;
	img->op->starved = true;
	fail(img, ENOSPC, "full until the next commit");
}

const volatile uint32_t *x3_pressed(x3_image *img)
{
	return &img->pressed;
}

/* Wait for the commit under way, if there is one. Return whether there was. */
static bool wait_for_commit(x3_image *img)
{
	if (!img->committing)
		return false;
	while (img->committing && !img->aborted)
		pthread_cond_wait(&img->wake, &img->lock);
	return true;
}

static int let_blocks_go(x3_image *img)
{
	int error;

	if (wait_for_commit(img) && usable_blocks(img) > img->blocks / 64)
		return 0;
	doomed_make_room(img);
	error = commit_until(img, img->tid);
	if (!error && img->nheld && usable_blocks(img) < HELD_SOON)
		error = checkpoint_now(img); /* it also releases the blocks in the log */
	return error;
}

int x3_relieve(x3_image *img, int for_blocks)
{
	int error = 0;

	image_lock(img);
	if (for_blocks && !img->aborted)
		error = let_blocks_go(img);
	else if (wait_for_commit(img) || !img->pressed)
		;
	else if (img->nlogged > img->cached_max / 8 * 3)
		error = checkpoint_now(img);
	else
		error = commit_until(img, img->tid);
	img->pressed = 0; /* the next operation sets it again if necessary */
	if (img->aborted)
		error = -EROFS;
	pthread_mutex_unlock(&img->lock);
	return error;
}
