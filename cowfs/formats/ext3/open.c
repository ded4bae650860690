/* Opening, closing and suspending an image. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"
#include "jbd.h"

static __thread char message[256]; /* of an x3_open that failed, or a copy of an image's message */


/* --- opening --- */

/* Delete or truncate the inodes on the orphan list: left by a crash, or kept until now. */
static int clean_orphans(x3_image *img)
{
	int64_t result;

	if (img->has_errors) /* e2fsck must check the image first */
		return 0;
	do {
		CHANGE (img) {
			uint32_t ino = img->sb->s_last_orphan;
			op.result = ino != 0;
			if (ino && inode_get(img, ino).raw->i_links_count == 0)
				inode_delete_some(img, ino, true);
			else if (ino)
				data_truncate_more(img, ino);
		}
		result = op_finish(&op);
	} while (result > 0);
	if (result == -ESTALE) { /* freed after orphan_check(), by the redo log or a forged log */
		snprintf(img->message, sizeof img->message, "the orphan list is damaged");
		return -EBADMSG;
	}
	return result;
}

/* Make an image's structures in memory, and read the blocks that are always needed. */
static int read_all(x3_image *img)
{
	uint32_t buckets = 1024;
	int error = super_load(img);

	if (error)
		return error;
	img->cached_max = (img->cache_bytes ? img->cache_bytes : 64 << 20) >> img->bits;
	img->cached_max = max(img->cached_max, (size_t)256);
	while (buckets < img->cached_max && buckets < 1u << 24)
		buckets *= 2;
	img->bucket_mask = buckets - 1;
	img->bucket = calloc(buckets, sizeof *img->bucket);
	img->gd_block = calloc(img->gd_blocks, sizeof *img->gd_block);
	img->hold = calloc(img->groups, sizeof *img->hold);
	if (!img->bucket || !img->gd_block || !img->hold)
		return -ENOMEM;
	QUERY (img) {
		groups_load(img);
		journal_load(img);
		if (img->sb->s_overhead_clusters)
			img->overhead = img->sb->s_overhead_clusters;
		else
			img->overhead += img->jlen;
	}
	return op_finish(&op);
}

/* Free everything that read_all() made, and everything based on it. */
static void unload(x3_image *img)
{
	if (img->bucket)
		cache_free(img);
	for (uint32_t g = 0; img->hold && g < img->groups; g++)
		free(img->hold[g]);
	free(img->hold);
	free(img->gd_block);
	if (img->jsorted != img->jmap)
		free(img->jsorted);
	free(img->jmap);
	img->hold = NULL;
	img->gd_block = NULL;
	img->jmap = img->jsorted = NULL;
	img->sb = NULL;
}

/* Find the transactions in the journal, and read the image again as it is with them. */
static int recover_in_memory(x3_image *img)
{
	int error = replay_find(img);

	error = error ? error : redo_find(img);
	if (!error && img->read_only) {
		error = redo_show(img);
		redo_forget(img);
	}
	if (error || !img->patches.n)
		return error;
	unload(img);
	return read_all(img);
}

/* Write the recovered transactions home. */
static int recover(x3_image *img)
{
	int error = patches_home(img, UINT32_MAX);

	error = error ? error : journal_empty(img);
	error = error ? error : redo_commit(img);
	redo_forget(img);
	return error;
}

static int load(x3_image *img)
{
	int error = read_all(img);
	bool in_use = !error && journal_is_in_use(img);

	img->redo.on = false;
	img->committed = ntohl(((struct journal_super *)img->jsb)->sequence) - 1;
	if (in_use)
		error = recover_in_memory(img);
	if (!error) {
		QUERY (img) /* check everything before writing anything */
			orphan_check(img);
		error = op_finish(&op);
	}
	if (error || img->read_only)
		return error == -EUCLEAN || error == -ESTALE ? -EBADMSG : error;
	img->saved_ns = now_ns();
	error = room_start(img);
	if (!error && in_use)
		error = recover(img);
	if (error)
		return error;
	if (getrandom(&img->random, sizeof img->random, GRND_NONBLOCK) < 0)
		img->random = now_ns();
	error = journal_start(img);
	error = error ? error : redo_start(img);
	for (size_t i = 0; i < 4096; i++)
		img->changed[i] = img->lasting[i] = img->committed;
	return error;
}

static void release(x3_image *img)
{
	unload(img);
	table_free(&img->patches);
	unsynced_free(img);
	redo_forget(img);
	free(img->redo.buf);
	free(img->dirty);
	free(img->logging);
	free(img->logged);
	free(img->log);
	free(img->doomed);
	free(img->held.run);
	free(img->held_logging.run);
	free(img->held_logged.run);
	track_free(img);
	close(img->fd);
	if (img->trace_fd >= 0)
		close(img->trace_fd);
	if (img->meminfo >= 0)
		close(img->meminfo);
	pthread_mutex_destroy(&img->io_lock);
	pthread_mutex_destroy(&img->sync_lock);
	pthread_mutex_destroy(&img->sums_lock);
	pthread_mutex_destroy(&img->lock);
	pthread_cond_destroy(&img->wake);
	free(img);
}

int x3_open(int fd, uint32_t flags, uint64_t cache_bytes, int trace_fd, uint32_t debug, x3_image **out)
{
	x3_image *img = calloc(1, sizeof *img);
	pthread_condattr_t attr;
	int error;

	*out = NULL;
	message[0] = 0;
	if (!img)
		return -ENOMEM;
	img->read_only = flags & X3_READ_ONLY;
	img->debug = debug;
	img->cache_bytes = cache_bytes;
	img->sync_ns = 2 * QUICK_SYNC; /* not known to be quick */
	img->synced = UINT64_MAX;      /* data written by a killed daemon may not be on disk yet */
	img->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	img->meminfo = img->read_only ? -1 : open("/proc/meminfo", O_RDONLY | O_CLOEXEC);
	img->trace_fd = trace_fd < 0 ? -1 : fcntl(trace_fd, F_DUPFD_CLOEXEC, 3);
	pthread_mutex_init(&img->io_lock, NULL);
	pthread_cond_init(&img->inject_wake, NULL);
	pthread_mutex_init(&img->sync_lock, NULL);
	pthread_mutex_init(&img->sums_lock, NULL);
	pthread_mutex_init(&img->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&img->wake, &attr);
	pthread_condattr_destroy(&attr);
	if (img->fd < 0 || (trace_fd >= 0 && img->trace_fd < 0))
		error = -errno;
	else
		error = load(img);
	if (!error && !img->read_only)
		error = clean_orphans(img);
	if (error) {
		snprintf(message, sizeof message, "%s", img->message[0] ? img->message : strerror(-error));
		release(img);
		return error;
	}
	*out = img;
	return 0;
}

int x3_close(x3_image *img)
{
	int error = img->aborted ? -EIO : 0;

	if (!img->read_only && !img->suspended && !error) {
		if (img->stalled)
			error = x3_commit(img);
		if (!error)
			error = clean_orphans(img);
		if (!error)
			error = x3_checkpoint(img);
		if (!error)
			error = journal_finish(img);
	}
	release(img);
	return error;
}

void x3_abandon(x3_image *img)
{
	release(img);
}

const char *x3_message(x3_image *img)
{
	if (img) {
		pthread_mutex_lock(&img->lock);
		memcpy(message, img->message, sizeof message);
		pthread_mutex_unlock(&img->lock);
	}
	return message;
}


/* --- suspending --- */

/* Whether an operation is under way, or some blocks are not home yet. */
static bool is_busy(const x3_image *img)
{
	return img->committing || img->truncations || img->atoms || img->readers;
}

int x3_suspend(x3_image *img)
{
	int error = img->read_only ? -EROFS : 0;

	while (!error && doomed_free_some(img)) /* other programs would take them for leftovers of a crash */
		;
	image_lock(img);
	img->draining = true; /* from now on, readers hold the lock */
	for (int pass = 0; pass < 2 && !error; pass++) {
		while (is_busy(img))
			pthread_cond_wait(&img->wake, &img->lock);
		if (pass == 1) { /* little is left to write: now all others wait */
			img->suspended = img->resuming = true;
			img->resumer = pthread_self();
		}
		error = img->aborted ? -EROFS : checkpoint_now(img);
	}
	img->draining = img->resuming = false;
	if (!error) {
		error = journal_finish(img);
		if (error)
			abort_image(img, -error, "the filesystem cannot be marked clean: %s", strerror(-error));
	}
	if (error) {
		img->suspended = false;
		pthread_cond_broadcast(&img->wake);
	}
	pthread_mutex_unlock(&img->lock);
	return error;
}

int x3_resume(x3_image *img, int fd)
{
	int error = fd >= 0 && dup3(fd, img->fd, O_CLOEXEC) < 0 ? -errno : 0;

	pthread_mutex_lock(&img->lock);
	img->resuming = true;
	img->resumer = pthread_self();
	pthread_mutex_unlock(&img->lock);
	io_changed(img);
	unload(img);                           /* all others wait */
	img->ndoomed = img->doomed_blocks = 0; /* the other program has freed them, or x3_close() does */
	error = error ? error : load(img);
	pthread_mutex_lock(&img->lock);
	if (error) {
		img->dead = true;
		abort_image(img, -error, NULL);
	}
	img->suspended = img->resuming = false;
	pthread_cond_broadcast(&img->wake);
	pthread_mutex_unlock(&img->lock);
	return error;
}

int x3_switch(x3_image *img, int fd)
{
	int error = 0;

	image_lock(img);
	if (img->dead)
		error = -EIO;
	else if (img->ndirty || img->committing || img->nlogged || img->jhead != img->jfirst)
		error = -EBUSY;
	else if (dup3(fd, img->fd, O_CLOEXEC) < 0) /* atomic for threads that read */
		error = -errno;
	else
		error = room_start(img);
	io_changed(img);
	if (!error)
		error = redo_start(img); /* the new file may have a name, unlike the old one */
	pthread_mutex_unlock(&img->lock);
	return error;
}
