/*
 * Operations. Each holds the lock. If it fails, it is undone, and perhaps tried again.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>

#include "internal.h"

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
		return false; /* if the image is stalled, this operation is done, and the next is refused */
	}
	if (op->tries && !(op->error == ENOSPC && op->starved && op->tries <= 3))
		return false;
	/* Some blocks are held back or about to be freed: make them usable. */
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

/* End the operation and undo its changes. */
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

/* Abort the image: write nothing more. Without *format*, the message is already set. */
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
