/*
 * Returning the blocks of deleted files to the disk that contains a sparse image.
 *
 * An image counts as sparse if its file has holes when it is opened. After a transaction is on disk, long runs of the
 * blocks that it freed become holes of the file, before they can be used again. Earlier this is not possible: after a
 * crash the blocks would still belong to a file. Short runs stay allocated, because a system call for each would cost
 * too much and would fragment the file. cowfs trim returns them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "internal.h"

#define HOLES_MIN (1u << 20)  /* bytes of holes that make a file sparse */
#define RUN_MIN (64u << 10)   /* bytes of the shortest run that is returned */
#define TRACED_MAX (1u << 16) /* bytes in one record of a trace */

/* When the image is opened or resumed: find out whether it is sparse. */
void give_back_start(x3_image *img)
{
	struct stat st;

	img->gives_back = img->debug & X3_GIVE_BACK ||
			  (!img->read_only && !img->in_memory && fstat(img->fd, &st) == 0 && S_ISREG(st.st_mode) &&
			   st.st_size - st.st_blocks * 512 >= HOLES_MIN);
}

static int by_start(const void *a, const void *b)
{
	uint32_t x = ((const struct run *)a)->start, y = ((const struct run *)b)->start;

	return (x > y) - (x < y);
}

/* Return the runs that are long enough, sorted, adjacent ones joined; their number in *n*. NULL: no memory. */
static struct run *long_runs(const x3_image *img, const struct runs *runs, size_t *n)
{
	struct run *found = malloc((runs->n + 1) * sizeof *found);
	size_t joined = 0;

	*n = 0;
	if (!found)
		return NULL;
	memcpy(found, runs->run, runs->n * sizeof *found);
	qsort(found, runs->n, sizeof *found, by_start);
	for (size_t i = 0; i < runs->n; i++) {
		if (joined && found[joined - 1].start + found[joined - 1].count == found[i].start)
			found[joined - 1].count += found[i].count;
		else
			found[joined++] = found[i];
	}
	for (size_t i = 0; i < joined; i++)
		if ((uint64_t)found[i].count << img->bits >= (img->debug & X3_GIVE_BACK ? 1 : RUN_MIN))
			found[(*n)++] = found[i];
	return found;
}

static bool has_block(const struct run *runs, size_t n, uint32_t nr)
{
	size_t low = 0;

	while (low < n) {
		size_t middle = low + (n - low) / 2;
		if (runs[middle].start + runs[middle].count <= nr)
			low = middle + 1;
		else
			n = middle;
	}
	return low < n && runs[low].start <= nr;
}

/* Trace zeros for a punched range. */
static void trace_zeros(x3_image *img, uint64_t off, uint64_t len)
{
	for (uint64_t end = off + len, n; img->trace_fd >= 0 && off < end; off += n) {
		n = min(end - off, min(img->bs, TRACED_MAX));
		trace(img, X3_TRACE_WRITE, off, &(struct iovec){ (void *)zero, n }, 1);
	}
}

/*
 * Return blocks to the disk. The transaction that freed them is on disk, and they are still held back.
 *
 * Under the lock, which is dropped meanwhile, with img->committing. No reader may still have one of their numbers.
 */
void give_back(x3_image *img, const struct runs *runs)
{
	size_t n;
	struct run *run;
	int error = 0;

	if (!img->gives_back || !runs->n || !(run = long_runs(img, runs, &n)))
		return;
	for (size_t i = 0; n && i < img->cached; i++)
		if (img->all[i]->flags & HAS_ROOM && has_block(run, n, img->all[i]->nr))
			img->all[i]->flags &= ~HAS_ROOM;
	img->edge[0].known = img->edge[1].known = false;
	pthread_mutex_unlock(&img->lock);
	for (size_t i = 0; i < n && !error; i++) {
		uint64_t off = (uint64_t)run[i].start << img->bits, len = (uint64_t)run[i].count << img->bits;
		trace_zeros(img, off, len);
		if (fallocate(img->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off, len))
			error = errno;
	}
	pthread_mutex_lock(&img->lock);
	free(run);
	if (error) /* not supported, or a failing disk: do not try again */
		img->gives_back = false;
}
