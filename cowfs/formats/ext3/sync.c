/*
 * The entry points for durability, and for the thread that commits in the background.
 */
#include <errno.h>
#include <time.h>

#include "internal.h"

#define LITTLE (1u << 20)

static int64_t clock_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * (int64_t)NS + t.tv_nsec;
}

int x3_commit(x3_image *img)
{
	int error = 0;

	image_lock(img);
	if (img->aborted)
		error = -EROFS;
	else if (!img->read_only)
		error = commit_until(img, img->tid);
	pthread_mutex_unlock(&img->lock);
	return error;
}

int x3_checkpoint(x3_image *img)
{
	int error = 0;

	image_lock(img);
	if (img->aborted)
		error = -EROFS;
	else if (!img->read_only)
		error = checkpoint_now(img);
	pthread_mutex_unlock(&img->lock);
	return error;
}

static int sync_inode(x3_image *img, uint32_t ino, int datasync)
{
	uint32_t tid, written;
	uint64_t failures;
	int error = 0;
	bool done;

	if (img->read_only)
		return 0;
	do {
		image_lock(img);
		tid = (datasync ? img->lasting : img->changed)[ino % 4096];
		written = img->changed[ino % 4096]; /* the transaction of the write, or a later one */
		done = img->aborted || img->stalled || tid_after(tid, img->committed);
		if (done) {
			error = img->aborted ? -EROFS : commit_until(img, tid);
			/* That commit may have started before the data was written; then it does not include
			 * it. */
			done = error || !tid_after(written, img->committed);
		}
		if (done) {
			pthread_mutex_unlock(&img->lock);
			return error;
		}
		failures = io_failures(img);
		pthread_mutex_unlock(&img->lock);
		error = io_barrier(img);
	} while (!error && failures != io_failures(img)); /* another barrier got the error of this one */
	if (!error)
		return 0;
	pthread_mutex_lock(&img->lock);
	error = barrier_failed(img, error);
	pthread_mutex_unlock(&img->lock);
	return error;
}

int x3_directory_is_synced(x3_image *img, uint32_t ino)
{
	int synced;

	image_lock(img);
	synced = !img->read_only && !img->aborted && !img->stalled &&
		 !tid_after(img->changed[ino % 4096], img->committed); /* all of a directory is in the journal */
	pthread_mutex_unlock(&img->lock);
	return synced;
}

int x3_fsync(x3_image *img, uint32_t ino, int datasync)
{
	enum { SHARE = 8 }; /* the latest counts for an eighth */
	uint64_t barriers = __atomic_load_n(&img->barriers, __ATOMIC_RELAXED);
	int64_t begun = clock_ns();
	int error = sync_inode(img, ino, datasync);

	if (error || barriers != __atomic_load_n(&img->barriers, __ATOMIC_RELAXED)) {
		int64_t usual = __atomic_load_n(&img->sync_ns, __ATOMIC_RELAXED);
		usual += (clock_ns() - begun - usual) / SHARE;
		__atomic_store_n(&img->sync_ns, usual, __ATOMIC_RELAXED);
	}
	return error;
}

int x3_is_quick_to_sync(x3_image *img)
{
	uint64_t synced = __atomic_load_n(&img->bytes_synced, __ATOMIC_RELAXED);
	uint64_t bytes = __atomic_load_n(&img->bytes_written, __ATOMIC_RELAXED) - synced +
			 (uint64_t)__atomic_load_n(&img->ndirty, __ATOMIC_RELAXED) * img->bs;

	return bytes < LITTLE && __atomic_load_n(&img->sync_ns, __ATOMIC_RELAXED) < QUICK_SYNC;
}

int x3_dirty(x3_image *img)
{
	int dirty;

	image_lock(img);
	dirty = (img->ndirty || img->stalled) && !img->aborted;
	pthread_mutex_unlock(&img->lock);
	return dirty;
}

static bool is_past(const struct timespec *when)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec > when->tv_sec || (now.tv_sec == when->tv_sec && now.tv_nsec >= when->tv_nsec);
}

int x3_wait(x3_image *img, int64_t ms)
{
	struct timespec until;
	int result;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += ms / 1000;
	until.tv_nsec += ms % 1000 * 1000000;
	until.tv_sec += until.tv_nsec / NS;
	until.tv_nsec %= NS;
	pthread_mutex_lock(&img->lock);
	img->attended = !img->woken;
	while (!img->woken && (img->due != img->tid || img->aborted)) {
		if (img->ndoomed && !img->aborted && !img->stalled && !is_suspended(img)) {
			pthread_mutex_unlock(&img->lock);
			doomed_free_some(img);
			let_others();
			pthread_mutex_lock(&img->lock);
			if (is_past(&until))
				break;
		} else if (pthread_cond_timedwait(&img->wake, &img->lock, &until) == ETIMEDOUT) {
			break;
		}
	}
	img->woken = false;
	img->due = 0;
	result = (img->ndirty || img->stalled) && !img->aborted;
	pthread_mutex_unlock(&img->lock);
	return result;
}

void x3_wake(x3_image *img)
{
	pthread_mutex_lock(&img->lock);
	img->woken = true;
	img->attended = false;
	pthread_cond_broadcast(&img->wake);
	pthread_mutex_unlock(&img->lock);
}

void x3_begin(x3_image *img)
{
	image_lock(img);
	img->atoms++;
	pthread_mutex_unlock(&img->lock);
}

void x3_end(x3_image *img)
{
	pthread_mutex_lock(&img->lock);
	if (--img->atoms == 0) {
		img->excused = false;
		redo_flush(img);
		if (img->committing) /* who commits waits for this; nobody else does */
			pthread_cond_broadcast(&img->wake);
		if (redo_is_lost(img) && !img->stalled)
			commit_until(img, img->redo.lost_tid);
	}
	pthread_mutex_unlock(&img->lock);
}
