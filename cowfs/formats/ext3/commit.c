/*
 * Commit and checkpoint, in the format of Linux (fs/jbd2, include/linux/jbd2.h), big-endian.
 *
 * A transaction is written as descriptor blocks, each followed by the metadata blocks that it lists,
 * a barrier, and a commit block; it takes effect when the commit block is on disk. The log is not used
 * as a ring: when the next transaction does not fit behind the last, a checkpoint writes all logged
 * blocks home, and the log begins again. The sequence numbers are our transaction numbers (tid).
 *
 * There are no revoke records: a block that was freed while it is in the log stays unused until the
 * checkpoint (img->held_logged), so that no replay can overwrite its next content.
 *
 * Commit and checkpoint hold the lock only while they copy; operations continue during the I/O, and form
 * the next transaction. img->committing is set while one runs.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "internal.h"
#include "jbd.h"

#define BOUNCE min(256u, (4u << 20) >> img->bits) /* blocks that a checkpoint copies at a time */

bool tid_after(uint32_t a, uint32_t b)
{
	return (int32_t)(a - b) > 0;
}

static uint32_t tags_per_block(const x3_image *img)
{
	return (img->bs - sizeof(struct header) - 16) / sizeof(struct tag);
}

/* How many descriptors a transaction of *n* blocks needs. */
static uint32_t descriptors(const x3_image *img, uint32_t n)
{
	return (n + tags_per_block(img) - 1) / tags_per_block(img);
}


/* --- checkpoint --- */

static int by_number(const void *a, const void *b)
{
	uint32_t x = (*(struct block *const *)a)->nr, y = (*(struct block *const *)b)->nr;

	return (x > y) - (x < y);
}

/* Write *n* blocks home, whose contents are in *copies*. */
static int write_home(x3_image *img, struct block **blocks, const char *copies, size_t n)
{
	for (size_t i = 0, k; i < n; i += k) {
		for (k = 1; i + k < n && blocks[i + k]->nr == blocks[i]->nr + k; k++)
			;
		int error = io_write1(img, copies + (i << img->bits), k << img->bits,
				      (uint64_t)blocks[i]->nr << img->bits);
		if (error)
			return error;
	}
	return 0;
}

/* For tests: leave out of the checkpoint the blocks for which block_forget() was called. */
static void drop_forgotten(x3_image *img)
{
	size_t n = 0;

	for (size_t i = 0; i < img->nlogged; i++)
		if (img->logged[i]->flags & LOGGED)
			img->logged[n++] = img->logged[i];
	img->nlogged = n;
}

/*
 * Write home what is logged, and empty the log. The caller has img->committing; the lock is dropped
 * meanwhile.
 */
static int checkpoint(x3_image *img)
{
	uint64_t failures = io_failures(img);
	char *bounce;
	int error = 0;

	if (!img->nlogged && img->jhead == img->jfirst)
		return 0;
	bounce = malloc((size_t)BOUNCE << img->bits);
	if (!bounce)
		return -ENOMEM;
	qsort(img->logged, img->nlogged, sizeof *img->logged, by_number);
	if (img->debug & X3_NO_FORGET)
		drop_forgotten(img);
	for (size_t i = 0; i < img->nlogged && !error; i += BOUNCE) {
		size_t n = min(img->nlogged - i, (size_t)BOUNCE);
		for (size_t k = 0; k < n; k++) {
			struct block *b = img->logged[i + k];
			memcpy(bounce + (k << img->bits), b->logged ? b->logged : b->data, img->bs);
		}
		pthread_mutex_unlock(&img->lock);
		error = write_home(img, img->logged + i, bounce, n);
		pthread_mutex_lock(&img->lock);
	}
	free(bounce);
	pthread_mutex_unlock(&img->lock);
	error = error ? error : io_barrier(img);
	if (!error && failures != io_failures(img))
		error = img->failure;
	error = error ? error : journal_write_super(img, img->jfirst);
	pthread_mutex_lock(&img->lock);
	if (error)
		return error; /* the log is as it was */
	img->jhead = img->jfirst;
	for (size_t i = 0; i < img->nlogged; i++) {
		struct block *b = img->logged[i];
		free(b->logged);
		b->logged = NULL;
		b->flags &= ~LOGGED;
	}
	img->nlogged = 0;
	held_release(img, &img->held_logged, true);
	img->checkpoints++;
	return 0;
}


/* --- commit --- */

/* Where the image of the *i*-th block of the transaction being committed is in img->log. */
static char *log_image(const x3_image *img, size_t i)
{
	return img->log + ((i + i / tags_per_block(img) + 1) << img->bits);
}

/* Write the descriptor block for the blocks of the transaction from *from* on. */
static void describe(x3_image *img, size_t from, const bool *escaped)
{
	size_t n = min(img->nlogging - from, (size_t)tags_per_block(img));
	struct header *header = (struct header *)(log_image(img, from) - img->bs);
	char *p = (char *)(header + 1);

	memset(header, 0, img->bs);
	*header = (struct header){ htonl(JBD_MAGIC), htonl(DESCRIPTOR), htonl(img->tid) };
	for (size_t i = 0; i < n; i++) {
		uint16_t flags = (i ? SAME_UUID : 0) | (i == n - 1 ? LAST_TAG : 0) | (escaped[i] ? ESCAPED : 0);
		struct tag tag = { htonl(img->logging[from + i]->nr), 0, htons(flags) };
		memcpy(p, &tag, sizeof tag);
		p += sizeof tag;
		if (i == 0) {
			memcpy(p, ((struct journal_super *)img->jsb)->uuid, 16);
			p += 16;
		}
	}
}

/*
 * End the running transaction: copy it to img->log as it will be in the journal, and begin the next.
 *
 * Blocks that were freed within it are left out: nobody will read them.
 */
static int close_transaction(x3_image *img)
{
	bool escaped[tags_per_block(img)];
	size_t need = (img->ndirty + descriptors(img, img->ndirty) + 1) << img->bits;
	char *log = try_grow(img->log, &img->log_size, need, 1);
	struct block **logging = try_grow(img->logging, &img->logging_cap, img->ndirty, sizeof *logging);
	struct block **logged = try_grow(img->logged, &img->logged_cap, img->nlogged + img->ndirty, sizeof *logged);

	img->log = log ? log : img->log;
	img->logging = logging ? logging : img->logging;
	img->logged = logged ? logged : img->logged;
	if (!log || !logging || !logged)
		return -ENOMEM;
	img->nlogging = 0;
	for (size_t i = 0; i < img->ndirty; i++) {
		struct block *b = img->dirty[i];
		if (b->flags & DIRTY && !block_is_free(img, b->nr))
			img->logging[img->nlogging++] = b;
		b->flags &= ~(DIRTY | LISTED);
	}
	img->ndirty = 0;
	if (!img->nlogging) /* all changes were undone: there is no transaction, and its number is used again */
		return 0;
	qsort(img->logging, img->nlogging, sizeof *img->logging, by_number);
	for (size_t i = 0; i < img->nlogging; i++) {
		struct block *b = img->logging[i];
		char *image = log_image(img, i);
		size_t k = i % tags_per_block(img);
		b->flags |= LOGGING;
		memcpy(image, b->data, img->bs);
		escaped[k] = *(uint32_t *)image == htonl(JBD_MAGIC);
		if (escaped[k]) {
			*(uint32_t *)image = 0;
			b->flags |= WAS_ESCAPED;
		}
		if (k == tags_per_block(img) - 1 || i == img->nlogging - 1)
			describe(img, i - k, escaped);
	}
	img->held_logging = img->held;
	img->held = (struct runs){ 0 };
	img->held_now = 0;
	img->pressed = 0;
	img->tid++;
	return 0;
}

/* Write *n* blocks into the journal from its block *at* on. */
static int write_journal(x3_image *img, uint32_t at, const char *data, uint32_t n)
{
	for (uint32_t i = 0, k; i < n; i += k) {
		for (k = 1; i + k < n && img->jmap[at + i + k] == img->jmap[at + i] + k; k++)
			;
		int error = io_write1(img, data + ((size_t)i << img->bits), (size_t)k << img->bits,
				      (uint64_t)img->jmap[at + i] << img->bits);
		if (error)
			return error;
	}
	return 0;
}

/* Write the closed transaction to the journal; the same barrier puts file data on disk. Without the lock. */
static int write_log(x3_image *img, uint32_t tid)
{
	uint32_t n = img->nlogging + descriptors(img, img->nlogging);
	struct commit_block *commit = (struct commit_block *)(img->log + ((size_t)n << img->bits));
	struct timespec now;
	int error;

	memset(commit, 0, img->bs);
	commit->header = (struct header){ htonl(JBD_MAGIC), htonl(COMMIT), htonl(tid) };
	clock_gettime(CLOCK_REALTIME, &now);
	commit->sec = __builtin_bswap64(now.tv_sec);
	commit->nsec = htonl(now.tv_nsec);
	error = write_journal(img, img->jhead, img->log, n);
	if (!error && !(img->debug & X3_NO_BARRIER))
		error = io_barrier(img);
	error = error ? error : write_journal(img, img->jhead + n, (char *)commit, 1);
	return error ? error : io_barrier(img);
}

/* Wait for those who read without the lock. */
static void drain_readers(x3_image *img)
{
	bool before = img->draining;

	img->draining = true;
	while (img->readers)
		pthread_cond_wait(&img->wake, &img->lock);
	img->draining = before;
}

/* The transaction is on disk: its blocks count as logged, and the blocks it freed may be reused. */
static int finish_transaction(x3_image *img)
{
	/* A reader may still have the number of a block that another file may use from now on. */
	drain_readers(img);
	give_back(img, &img->held_logging);
	for (size_t i = 0; i < img->nlogging; i++) {
		struct block *b = img->logging[i];
		if (!(b->flags & LOGGING))
			continue;
		if (!(b->flags & DIRTY)) {
			free(b->logged);
			b->logged = NULL;
		} else { /* changed again since: keep what was logged */
			char *image = log_image(img, i);
			if (!b->logged && !(b->logged = malloc(img->bs)))
				return -ENOMEM;
			memcpy(b->logged, image, img->bs);
			if (b->flags & WAS_ESCAPED)
				*(uint32_t *)b->logged = htonl(JBD_MAGIC);
		}
		if (!(b->flags & LOGGED))
			img->logged[img->nlogged++] = b;
		b->flags = (b->flags & ~(LOGGING | WAS_ESCAPED)) | LOGGED;
	}
	img->jhead += img->nlogging + descriptors(img, img->nlogging) + 1;
	img->nlogging = 0;
	held_release(img, &img->held_logging, img->debug & X3_NO_FORGET);
	img->commits++;
	return 0;
}

/* Whether somebody has truncated the file below the size of its filesystem: the data is lost. */
static bool is_cut(x3_image *img)
{
	struct stat st;

	return fstat(img->fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size < (int64_t)img->blocks << img->bits;
}

/*
 * Commit the running transaction, which is not empty; or the last one, if that failed for lack of space. With
 * img->committing.
 */
static int commit(x3_image *img)
{
	uint64_t failures;
	uint32_t tid;
	int error;

	if (is_cut(img)) {
		abort_image(img, EIO, "its file was truncated meanwhile");
		return -EIO;
	}
	for (int tries = 0; !img->nlogging; tries++) {
		while (img->atoms)
			pthread_cond_wait(&img->wake, &img->lock);
		uint32_t need = img->ndirty + descriptors(img, img->ndirty) + 1;
		if (img->jhead + need <= img->jend)
			break;
		if (tries > 1 || img->jfirst + need > img->jend)
			return -EOVERFLOW;
		error = checkpoint(img);
		if (error)
			return error;
	}
	error = img->nlogging ? 0 : close_transaction(img);
	if (error || !img->nlogging)
		return error;
	tid = img->tid - 1;
	failures = io_failures(img);
	if (img->debug & X3_EARLY)
		give_back(img, &img->held_logging);
	pthread_mutex_unlock(&img->lock);
	error = write_log(img, tid);
	pthread_mutex_lock(&img->lock);
	if (!error && failures != io_failures(img))
		error = img->failure; /* an fsync of a file got the error of this barrier */
	error = error ? error : finish_transaction(img);
	if (error)
		return error;
	img->committed = tid;
	if (!img->ndirty)
		img->saved_ns = now_ns();
	return 0;
}

/* Become the one thread that commits or checkpoints; false if the image is aborted. */
bool committing_begin(x3_image *img)
{
	while (img->committing && !img->aborted)
		pthread_cond_wait(&img->wake, &img->lock);
	if (img->aborted)
		return false;
	img->committing = true;
	return true;
}

int committing_end(x3_image *img, int error)
{
	error = room_judge(img, error);
	img->committing = false;
	pthread_cond_broadcast(&img->wake);
	return error;
}

/*
 * A barrier of a thread that does not commit has failed.
 *
 * Return the error for that thread. Under the lock, which is dropped meanwhile. If the committing thread has
 * handled it already, do nothing: handled again, without the data it covered, it would pass for an error of
 * the journal.
 */
int barrier_failed(x3_image *img, int error)
{
	if (!committing_begin(img))
		return -EIO;
	if (unsynced_is_unjudged(img))
		return committing_end(img, error);
	img->committing = false;
	pthread_cond_broadcast(&img->wake);
	return error;
}

/*
 * Return when transaction *tid* is on disk, and the image not stalled. Under the lock, which is dropped
 * meanwhile; not within an operation. All threads that wait at the same time share one commit.
 */
int commit_until(x3_image *img, uint32_t tid)
{
	while (tid_after(tid, img->committed) || img->stalled) {
		int error = 0;
		if (!img->ndirty && !img->nlogging && !img->committing && !img->stalled)
			return 0; /* there is no such transaction yet */
		if (!committing_begin(img))
			return -EIO;
		error = unsynced_home(img);
		if (error)
			;
		else if (!img->ndirty && !img->nlogging)
			error = img->stalled ? checkpoint(img) : 0;
		else if (tid_after(tid, img->committed) || img->stalled)
			error = commit(img);
		error = committing_end(img, error);
		if (error)
			return error;
	}
	return 0;
}

/* Commit, and write everything home. As commit_until. */
int checkpoint_now(x3_image *img)
{
	int error = commit_until(img, img->tid);

	if (error)
		return error;
	if (!committing_begin(img))
		return -EIO;
	return committing_end(img, checkpoint(img));
}
