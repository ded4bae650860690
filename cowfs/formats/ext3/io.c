/*
 * The image's file: reads, writes and barriers, with the traces and injected faults of tests.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "internal.h"

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

/* The same, with the contents of img->patches, which are not home yet. */
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
			__atomic_fetch_add(&img->writes, 1,
					   __ATOMIC_SEQ_CST); /* no earlier barrier covers this write */
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

/* Write up to three adjacent pieces. *end* is set to the offset where writing stopped, also after an error. */
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

/* Block until everything written before is on disk. Return at once if the last barrier covers it. */
int io_barrier(x3_image *img)
{
	uint64_t nr, writes, bytes;
	int error;

	pthread_mutex_lock(&img->sync_lock);
	writes = __atomic_load_n(&img->writes, __ATOMIC_SEQ_CST);
	if (writes == img->synced && !unsynced_is_unjudged(img)) {
		pthread_mutex_unlock(&img->sync_lock);
		return 0;
	}
	bytes = __atomic_load_n(&img->bytes_written, __ATOMIC_RELAXED);
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
	__atomic_store_n(&img->bytes_synced, bytes, __ATOMIC_RELAXED);
	__atomic_fetch_add(&img->barriers, 1, __ATOMIC_RELAXED);
	return 0;
}

/* Another program may have written to the file, or it is another file: do not skip the next barrier. */
void io_changed(x3_image *img)
{
	pthread_mutex_lock(&img->sync_lock);
	img->synced = UINT64_MAX;
	pthread_mutex_unlock(&img->sync_lock);
}
