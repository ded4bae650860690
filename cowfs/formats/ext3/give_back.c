/*
 * Giving the blocks of deleted files back to the disk that a sparse image is on.
 *
 * An image whose file has holes when it is opened takes its blocks as it needs them. A transaction that is on disk
 * has freed some: before they may be used again, those in long runs become holes of the file. Before the transaction
 * is on disk they are still part of a file, after a crash. Short runs stay: a call for each would cost more than
 * they are worth, and divide the file into many pieces; cowfs trim gives them back.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "internal.h"

#define HOLES_MIN (1u << 20)  /* bytes that a file must lack to count as sparse */
#define RUN_MIN (64u << 10)   /* bytes of a run that is worth a call */
#define TRACED_MAX (1u << 16) /* bytes in one record of a trace */

/* When the image is opened, or resumed: whether it is one that gives back. */
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

/* The runs that are long enough, in order, neighbours joined; their number in *n*. NULL: no memory. */
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

/* What a punched range reads as, for a trace. */
static void trace_zeros(x3_image *img, uint64_t off, uint64_t len)
{
	for (uint64_t end = off + len, n; img->trace_fd >= 0 && off < end; off += n) {
		n = min(end - off, min(img->bs, TRACED_MAX));
		trace(img, X3_TRACE_WRITE, off, &(struct iovec){ (void *)zero, n }, 1);
	}
}

/*
 * The transaction that has freed these blocks is on disk, and they are still held back: let the disk have them.
 *
 * Under the lock, which is dropped meanwhile, with img->committing, when no reader has the number of one any more.
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
	if (error) /* it cannot be done there, or the disk has other worries: it is not tried again */
		img->gives_back = false;
}
