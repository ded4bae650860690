/*
 * The image's file, the cache of its metadata, and operations with their undo.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "internal.h"


/* --- the image's file --- */

/*
 * Return the -errno that a test injects into the next system call of this kind, or 0; block if the test wants
 * that.
 */
int injected(x3_image *img, int kind)
{
	int error = 0;

	if (__atomic_load_n(&img->inject_kind, __ATOMIC_RELAXED) != kind)
		return 0;
	pthread_mutex_lock(&img->io_lock);
	if (img->inject_kind == kind && (img->inject_nth <= 1 || --img->inject_nth == 0)) {
		error = -img->inject_error;
		if (!img->inject_sticky)
			img->inject_kind = 0;
		img->inject_nth = 0;
		img->inject_holds = !error;
		while (img->inject_holds)
			pthread_cond_wait(&img->inject_wake, &img->io_lock);
	}
	pthread_mutex_unlock(&img->io_lock);
	return error;
}

/* Append a record to the trace, if there is one. */
void trace(x3_image *img, uint64_t kind, uint64_t off, const struct iovec *iov, int count)
{
	uint64_t header[3] = { kind, off, 0 };

	if (img->trace_fd < 0)
		return;
	for (int i = 0; i < count; i++)
		header[2] += iov[i].iov_len;
	pthread_mutex_lock(&img->io_lock);
	bool good = write(img->trace_fd, header, sizeof header) == sizeof header;
	for (int i = 0; i < count; i++)
		good &= write(img->trace_fd, iov[i].iov_base, iov[i].iov_len) == (ssize_t)iov[i].iov_len;
	if (!good) /* a trace with a gap proves nothing */
		abort();
	pthread_mutex_unlock(&img->io_lock);
}

/* Read *len* bytes of the file; beyond its end all bytes are zero. */
int io_read_raw(x3_image *img, void *buf, size_t len, uint64_t off)
{
	int error = injected(img, X3_PREAD);

	for (char *p = buf; len && !error;) {
		ssize_t n = pread(img->fd, p, len, off);
		if (n < 0 && errno != EINTR)
			return -errno;
		if (n == 0) {
			memset(p, 0, len);
			break;
		}
		if (n > 0)
			p += n, len -= n, off += n;
	}
	return error;
}

/* The same, as recovery sees the file if one is under way, or the image was opened read-only without it. */
int io_read(x3_image *img, void *buf, size_t len, uint64_t off)
{
	int error = io_read_raw(img, buf, len, off);

	return error || !img->patches.n ? error : patches_read(img, buf, len, off);
}

static int write_pieces(x3_image *img, const struct iovec *iov, int count, uint64_t off, uint64_t *end)
{
	struct iovec left[3], *next = left;
	uint64_t at = *end = off;
	int error = injected(img, X3_PWRITE), n = count;

	if (error)
		return error;
	memcpy(left, iov, count * sizeof *iov);
	while (n) {
		ssize_t done = pwritev(img->fd, next, n, at);
		if (done < 0 && errno != EINTR)
			return -errno;
		if (done > 0) {
			track_write(img, at, at + done);
			__atomic_fetch_add(&img->writes, 1, __ATOMIC_SEQ_CST); /* now: no barrier before covers it */
		}
		*end = at += max(done, 0);
		for (; n && done >= (ssize_t)next->iov_len; next++, n--)
			done -= next->iov_len;
		if (n && done > 0) {
			next->iov_base = (char *)next->iov_base + done;
			next->iov_len -= done;
		}
	}
	__atomic_fetch_add(&img->bytes_written, at - off, __ATOMIC_RELAXED);
	trace(img, X3_TRACE_WRITE, off, iov, count);
	return 0;
}

/* Write up to three adjacent pieces; *end* is where the writing stopped, be it because of an error. */
int io_write_until(x3_image *img, const struct iovec *iov, int count, uint64_t off, uint64_t *end)
{
	int error = write_pieces(img, iov, count, off, end);

	if (error && img->tells_early)
		unsynced_end(img, error, 0);
	return error;
}

int io_write(x3_image *img, const struct iovec *iov, int count, uint64_t off)
{
	uint64_t end;

	return io_write_until(img, iov, count, off, &end);
}

int io_write1(x3_image *img, const void *buf, size_t len, uint64_t off)
{
	struct iovec iov = { (void *)buf, len };

	return io_write(img, &iov, 1, off);
}

/* Return when everything written before is on disk; at once if the last barrier covers it. */
int io_barrier(x3_image *img)
{
	uint64_t nr, writes;
	int error;

	pthread_mutex_lock(&img->sync_lock);
	writes = __atomic_load_n(&img->writes, __ATOMIC_SEQ_CST);
	if (writes == img->synced && !unsynced_is_unjudged(img)) {
		pthread_mutex_unlock(&img->sync_lock);
		return 0;
	}
	nr = ++img->barrier_nr;
	unsynced_begin(img, nr);
	error = injected(img, X3_FDATASYNC);
	if (!error && fdatasync(img->fd))
		error = -errno;
	error = unsynced_end(img, error, nr);
	img->synced = error ? UINT64_MAX : writes;
	pthread_mutex_unlock(&img->sync_lock);
	if (error)
		return error;
	__atomic_fetch_add(&img->barriers, 1, __ATOMIC_RELAXED);
	return 0;
}

/* Somebody else may have written to the file, or it is another file: the next barrier is needed. */
void io_changed(x3_image *img)
{
	pthread_mutex_lock(&img->sync_lock);
	img->synced = UINT64_MAX;
	pthread_mutex_unlock(&img->sync_lock);
}


/* --- the cache --- */

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
static void cache_trim(x3_image *img)
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


/* --- operations --- */

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

/* Whether this thread has to wait for x3_resume. */
bool is_suspended(const x3_image *img)
{
	return img->suspended && !(img->resuming && pthread_equal(img->resumer, pthread_self()));
}

/* Take the lock, once the image is not suspended. */
void image_lock(x3_image *img)
{
	pthread_mutex_lock(&img->lock);
	while (is_suspended(img))
		pthread_cond_wait(&img->wake, &img->lock);
}

void op_begin(struct op *op, x3_image *img, uint32_t ino, enum change_kind changing)
{
	op->img = img;
	op->changing = changing;
	op->starved = false;
	op->tries = op->error = 0;
	op->result = op->rest = 0;
	op->ino = ino;
	image_lock(img);
}

/* Whether a file is being truncated, so that nobody may write to it. */
static bool is_truncated(const x3_image *img, uint32_t ino)
{
	const struct truncation *t = img->truncations;

	while (t && t->ino != ino)
		t = t->next;
	return t != NULL;
}

/* Before each attempt and after the last one: whether to try (again). */
bool op_again(struct op *op)
{
	x3_image *img = op->img;

	if (op->error == ENOSPC && op->starved && in_a_hurry()) {
		op->error = EAGAIN;
		return false;
	}
	if (op->tries && op->changing && !op->error)
		look_ahead(img);
	if (op->tries && img->atoms)
		return false; /* a commit would wait for the caller */
	if (op->tries && op->changing && !op->error) {
		if (img->ndirty > img->dirty_max || unsynced_is_much(img))
			commit_until(img, img->tid);
		else if (redo_is_lost(img) && !img->stalled)
			commit_until(img, img->redo.lost_tid);
		else if (img->nlogged > img->cached_max / 2)
			checkpoint_now(img);
		if (img->aborted)
			op->error = EIO;
		return false; /* if it is stalled: this was done, the next will be refused */
	}
	if (op->tries && !(op->error == ENOSPC && op->starved && op->tries <= 3))
		return false;
	/* Some free blocks are held back, or about to be freed: release them. */
	if (op->tries)
		doomed_make_room(img);
	if (op->tries && (op->tries == 1 ? commit_until(img, img->tid) : checkpoint_now(img))) {
		op->error = img->aborted ? EIO : ENOSPC;
		return false;
	}
	if (op->changing && !img->aborted && room_refuses(img, op->changing)) {
		op->error = img->stalled;
		return false;
	}
	while (is_suspended(img) || is_truncated(img, op->ino))
		pthread_cond_wait(&img->wake, &img->lock);
	op->error = 0;
	op->starved = false;
	op->late.len = 0;
	if (img->dead) {
		op->error = EIO;
		return false;
	}
	if (op->changing && (img->read_only || img->aborted)) {
		op->error = EROFS;
		return false;
	}
	op->tries++;
	img->op = op;
	op->held_before = img->held.n;
	img->undo.n = img->undo.used = 0;
	return true;
}

/* After an attempt. */
void op_end(struct op *op)
{
	x3_image *img = op->img;

	if (!op->error && op->changing)
		op->error = -redo_note(img, op->changing == CHANGES);
	if (!op->error && op->changing)
		op->error = -data_clear_late(img);
	if (op->error && op->changing) {
		undo_to(img, (struct mark){ 0, 0, op->held_before });
		if (op->error == EIO || op->error == EUCLEAN)
			abort_image(img, op->error, NULL);
		if (img->aborted == EUCLEAN && op->error == EUCLEAN)
			super_mark_damaged(img);
	}
	img->op = NULL;
	cache_trim(img);
}

int64_t op_finish(struct op *op)
{
	pthread_mutex_unlock(&op->img->lock);
	return op->error ? -op->error : op->result;
}

/* End the operation; nothing of it remains. */
void fail(x3_image *img, int error, const char *format, ...)
{
	va_list args;

	if (error == EIO || error == EUCLEAN || error == ENOMEM) {
		va_start(args, format);
		if (!img->aborted)
			vsnprintf(img->message, sizeof img->message, format, args);
		va_end(args);
	}
	img->op->error = error;
	longjmp(img->op->escape, 1);
}

/* Write nothing more. Without *format* the message is set already. */
void abort_image(x3_image *img, int error, const char *format, ...)
{
	va_list args;

	if (img->aborted)
		return;
	if (format) {
		va_start(args, format);
		vsnprintf(img->message, sizeof img->message, format, args);
		va_end(args);
	}
	img->aborted = error;
	if (img->data_lost)
		redo_drop(img);
	pthread_cond_broadcast(&img->wake);
}
