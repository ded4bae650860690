/*
 * File data that may not be on disk yet, and that the disk may still refuse.
 *
 * With a thin volume, a network filesystem or a quota, a write may succeed in the page cache and fail on its way to the
 * disk. fdatasync reports that once. After that, the kernel treats the pages as clean: it may drop them, and another
 * fdatasync succeeds. The journal and metadata are still in the engine's memory. File data is not, but mostly the pages
 * are still in the page cache. So the engine keeps a checksum of all data written since the last successful barrier.
 * When a barrier fails, that data is read back at once. Data with the right checksum is kept in memory (img->patches,
 * which io_read() prefers to the file) until a later barrier succeeds. Data with another checksum is lost, and the
 * image is aborted.
 *
 * A sum covers a whole unit of 4096 bytes, or of a block if that is smaller. A unit is read before a part of it is
 * written. Sums are recorded after the write and under the lock. The thread that handles a failed barrier also holds
 * the lock, so it knows all data that may be lost.
 *
 * A running barrier covers img->syncing. Data written meanwhile is in img->sums, which the next barrier covers.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "internal.h"

#define UNITS 64u /* in a leaf */
#define UNIT_MAX sizeof((struct edge *)0)->data
#define LEAVES_SOON 32768u /* number of leaves, of 512 bytes, from which on a commit is requested */
#define LEAVES_MAX 65536u  /* and from which on operations wait for it */
#define AT_A_TIME 1024u    /* blocks written home before a barrier, so that a full disk is noticed early */

struct leaf { /* the data of a patch in a table of sums; its number is that of its units divided by UNITS */
	uint32_t sum[UNITS]; /* 0: no sum */
	uint32_t ino[UNITS];
};

static uint32_t unit_bits(const x3_image *img)
{
	return min(img->bits, 12u);
}

/* Mix two words into *h*: all bits of their product matter. */
static uint64_t mix(uint64_t h, uint64_t a, uint64_t b)
{
	a ^= 0x9e3779b97f4a7c15u;
	b ^= h;
#ifdef __SIZEOF_INT128__
	unsigned __int128 product = (unsigned __int128)a * b;
	return (uint64_t)product ^ (uint64_t)(product >> 64);
#else
	h = (a ^ b >> 32) * 0xd6e8feb86659fd93u + b;
	return h ^ h >> 29;
#endif
}

/*
 * A fast checksum of a unit, never 0: one multiplication for 16 bytes, and four of them in parallel. Users who
 * construct two contents with the same sum only harm their own files.
 */
static uint32_t sum_of(const char *p, uint32_t len)
{
	uint64_t h[4] = { 1, 2, 3, 4 }, w[8], all = len;

	for (; len; p += sizeof w, len -= sizeof w) {
		memcpy(w, p, sizeof w);
#pragma GCC unroll 4
		for (int i = 0; i < 4; i++)
			h[i] = mix(h[i], w[2 * i], w[2 * i + 1]);
	}
	for (int i = 0; i < 4; i++)
		all = mix(all, h[i], h[i] >> 32);
	all ^= all >> 32;
	return (uint32_t)all ? all : 1;
}


/* --- the sums --- */

/* The leaf of a unit in a table, which is made if missing; NULL: no memory. */
static struct leaf *leaf_put(struct table *table, uint64_t unit)
{
	struct patch *p = table_put(table, unit / UNITS);

	if (p && !p->data)
		/* Patches have bytes. NOLINTNEXTLINE(clang-analyzer-unix.MallocSizeof) */
		p->data = calloc(1, sizeof(struct leaf));
	return p ? (struct leaf *)p->data : NULL;
}

/* The sum of a unit, or 0. */
static uint32_t sum_in(const struct table *table, uint64_t unit)
{
	const struct patch *p = table_find(table, unit / UNITS);

	return p && p->data ? ((struct leaf *)p->data)->sum[unit % UNITS] : 0;
}

static void put_sum(x3_image *img, uint64_t unit, uint32_t sum, uint32_t ino)
{
	struct leaf *leaf = leaf_put(&img->sums.table, unit);

	if (leaf) {
		leaf->sum[unit % UNITS] = sum;
		leaf->ino[unit % UNITS] = ino;
	} else {
		img->sums.broken = true;
	}
}

static void sums_free(struct sums *sums)
{
	table_free(&sums->table);
	sums->broken = false;
}

/* Set img->syncing to everything that may not be on disk. With sums_lock. */
static void sums_join(x3_image *img)
{
	struct table *new = &img->sums.table, *old = &img->syncing.table;

	img->syncing.broken |= img->sums.broken;
	if (!old->n) {
		table_free(old);
		*old = *new;
		*new = (struct table){ 0 };
	}
	for (uint32_t i = 0; new->n && i <= new->mask; i++) {
		const struct leaf *from = (struct leaf *)new->slot[i].data;
		uint64_t unit = (uint64_t)new->slot[i].nr * UNITS;
		struct leaf *to = from ? leaf_put(old, unit) : NULL;
		img->syncing.broken |= from && !to;
		for (uint32_t k = 0; to && k < UNITS; k++)
			if (from->sum[k]) {
				to->sum[k] = from->sum[k];
				to->ino[k] = from->ino[k];
			}
	}
	sums_free(&img->sums);
}

/* Record that data of a file is lost, and abort the image. */
static void lose(x3_image *img, uint32_t ino)
{
	img->data_lost = true;
	for (uint32_t i = 0; i < img->nlost; i++)
		if (img->lost[i] == ino)
			return;
	if (img->nlost < LOST_MAX)
		img->lost[img->nlost++] = ino;
}

/* Whether there are so many sums that a sync is better. */
bool unsynced_is_much(x3_image *img)
{
	uint32_t n = __atomic_load_n(&img->sums.table.n, __ATOMIC_RELAXED);

	if (n > LEAVES_SOON)
		ask_commit(img);
	return n > LEAVES_MAX;
}

void unsynced_free(x3_image *img)
{
	sums_free(&img->sums);
	sums_free(&img->syncing);
}


/* --- writing --- */

/* Copy *len* bytes of the pieces, from *skip* on. */
static void gather(const struct iovec *iov, size_t skip, char *buf, size_t len)
{
	for (; len; iov++) {
		if (skip < iov->iov_len) {
			size_t n = min(len, iov->iov_len - skip);
			/* Of *len* bytes that are there. NOLINTNEXTLINE(clang-analyzer-core.NonNullParamChecker) */
			memcpy(buf, (char *)iov->iov_base + skip, n);
			buf += n, len -= n, skip += n;
		}
		skip -= iov->iov_len;
	}
}

/* The address of *len* bytes of the pieces if they are contiguous, or NULL. */
static const char *in_one_piece(const struct iovec *iov, size_t skip, size_t len)
{
	for (; skip >= iov->iov_len; iov++)
		skip -= iov->iov_len;
	return skip + len <= iov->iov_len ? (char *)iov->iov_base + skip : NULL;
}

/* The known content of a unit that was written in part. */
static struct edge *edge_of(x3_image *img, uint64_t unit)
{
	for (int i = 0; i < 2; i++)
		if (img->edge[i].known && img->edge[i].unit == unit)
			return &img->edge[i];
	return NULL;
}

/*
 * Find the present content of a unit that is about to be written in part. Fail if it is not on disk yet and no longer
 * in the page cache. *other* is a unit whose content must stay known. Small appends read nothing.
 */
static int edge_need(x3_image *img, uint64_t unit, uint64_t other, uint32_t ino)
{
	uint32_t bits = unit_bits(img), sum;
	struct edge *e = edge_of(img, unit);
	int error;

	if (e)
		return 0;
	e = &img->edge[img->edge_turn ^= 1];
	if (e->known && e->unit == other)
		e = &img->edge[img->edge_turn ^= 1];
	e->known = false;
	error = io_read_raw(img, e->data, 1u << bits, unit << bits);
	if (error)
		return error;
	e->unit = unit;
	e->known = true;
	pthread_mutex_lock(&img->sums_lock);
	sum = sum_in(&img->sums.table, unit);
	sum = sum ? sum : sum_in(&img->syncing.table, unit);
	pthread_mutex_unlock(&img->sums_lock);
	if (sum && sum != sum_of(e->data, 1u << bits) && !table_find(&img->patches, unit >> (img->bits - bits)))
		lose(img, ino);
	return 0;
}

/* The content of a unit after a write of *iov* from *off* to *end*; in *buf* if necessary. NULL: unknown. */
static const char *unit_after(x3_image *img, uint64_t unit, const struct iovec *iov, uint64_t off, uint64_t end,
			      char *buf)
{
	uint32_t size = 1u << unit_bits(img);
	uint64_t at = unit * size, from = max(at, off), to = min(at + size, end);
	struct edge *e = edge_of(img, unit);
	const char *piece = to - from == size ? in_one_piece(iov, from - off, size) : NULL;

	if (piece) {
		if (e)
			e->known = false;
		return piece;
	}
	if (e)
		buf = e->data;
	else if (to - from < size && io_read_raw(img, buf, size, at)) /* a write stopped in the unit */
		return NULL;
	gather(iov, from - off, buf + (from - at), to - from);
	return buf;
}

/* Record the sums of what was written from *off* to *end*. */
static void put_sums(x3_image *img, uint32_t ino, const struct iovec *iov, uint64_t off, uint64_t end)
{
	uint32_t bits = unit_bits(img);
	char buf[UNIT_MAX];

	pthread_mutex_lock(&img->sums_lock);
	for (uint64_t unit = off >> bits; unit << bits < end; unit++) {
		const char *data = unit_after(img, unit, iov, off, end, buf);
		if (data)
			put_sum(img, unit, sum_of(data, 1u << bits), ino);
		else
			img->sums.broken = true;
	}
	pthread_mutex_unlock(&img->sums_lock);
}

/* Copy written data to the blocks in img->patches, so that they stay up to date. */
static void patch_over(x3_image *img, const struct iovec *iov, uint64_t off, uint64_t end)
{
	for (uint64_t at = off, stop; at < end; at = stop) {
		struct patch *p = table_find(&img->patches, at >> img->bits);
		stop = min(end, ((at >> img->bits) + 1) << img->bits);
		if (p && p->data) {
			gather(iov, at - off, p->data + (at & (img->bs - 1)), stop - at);
			img->patched++;
		}
	}
}

/* Write data of the file *ino*, and record its sums. Within an operation. */
int unsynced_write(x3_image *img, uint32_t ino, const struct iovec *iov, int count, uint64_t off)
{
	uint32_t bits = unit_bits(img), mask = (1u << bits) - 1;
	uint64_t end = off, done;
	int error = 0;

	if (!img->unsure)
		return io_write(img, iov, count, off);
	for (int i = 0; i < count; i++)
		end += iov[i].iov_len;
	if (off & mask)
		error = edge_need(img, off >> bits, off >> bits, ino);
	if (!error && end & mask)
		error = edge_need(img, end >> bits, off >> bits, ino);
	if (error)
		return error;
	error = io_write_until(img, iov, count, off, &done);
	if (done > off) {
		put_sums(img, ino, iov, off, done);
		if (img->patches.n)
			patch_over(img, iov, off, done);
	}
	if (error)
		img->edge[0].known = img->edge[1].known = false;
	return error;
}


/* --- barriers --- */

/* Barrier number *nr* begins. Everything that enters img->syncing from here on is earlier in the trace. */
void unsynced_begin(x3_image *img, uint64_t nr)
{
	pthread_mutex_lock(&img->sums_lock);
	sums_join(img);
	trace(img, X3_TRACE_BEGUN, nr, NULL, 0);
	pthread_mutex_unlock(&img->sums_lock);
}

/*
 * The barrier has ended: return the result for its waiters.
 *
 * The kernel reports an error once, to one thread. The others must get it too, until it has been handled. It
 * goes to the trace before that, since later writes are not what the kernel has dropped. *nr* 0: the error
 * does not come from a barrier.
 */
int unsynced_end(x3_image *img, int error, uint64_t nr)
{
	pthread_mutex_lock(&img->sums_lock);
	if (error) {
		__atomic_fetch_add(&img->failures, 1, __ATOMIC_SEQ_CST);
		img->failure = error;
		img->unjudged = true;
	} else if (img->unjudged) {
		error = img->failure;
	} else {
		sums_free(&img->syncing);
	}
	if (nr)
		trace(img, error ? X3_TRACE_FAILED : X3_TRACE_BARRIER, nr, NULL, 0);
	pthread_mutex_unlock(&img->sums_lock);
	return error;
}

/* Whether a barrier has failed and nobody has handled it yet. */
bool unsynced_is_unjudged(x3_image *img)
{
	bool unjudged;

	pthread_mutex_lock(&img->sums_lock);
	unjudged = img->unjudged;
	pthread_mutex_unlock(&img->sums_lock);
	return unjudged;
}

/* The number of failed barriers so far, including injected failures. */
uint64_t io_failures(x3_image *img)
{
	return __atomic_load_n(&img->failures, __ATOMIC_SEQ_CST);
}

/* The most bytes of memory for data that a disk has refused: half of the available memory. */
static uint64_t memory_to_keep_it(const x3_image *img)
{
	unsigned long long kilobytes = 128 << 10;
	char text[512]; /* MemAvailable is on the third line */
	ssize_t n = pread(img->meminfo, text, sizeof text - 1, 0);
	const char *line;

	text[n > 0 ? n : 0] = 0;
	line = strstr(text, "MemAvailable:");
	if (line)
		sscanf(line, "MemAvailable: %llu", &kilobytes);
	return img->debug & X3_NO_MEMORY ? 0 : kilobytes * 1024 / 2;
}

/* Whether the *data* of a block matches its known sums; *first* is its first unit in a leaf. */
static bool is_as_it_was(const x3_image *img, const struct leaf *leaf, uint32_t first, uint32_t count, const char *data)
{
	uint32_t size = 1u << unit_bits(img);

	for (uint32_t i = 0; i < count; i++)
		if (leaf->sum[first + i] && sum_of(data + i * size, size) != leaf->sum[first + i])
			return false;
	return true;
}

/*
 * Read back a block that a barrier may have lost, and keep it, or, without memory for that, at least leave it
 * in the page cache. False: it is lost.
 */
static bool keep_block(x3_image *img, uint64_t nr, const struct leaf *leaf, uint32_t first, uint32_t count,
		       uint64_t *memory)
{
	uint64_t unit = nr << (img->bits - unit_bits(img));
	char copy[BLOCK_MAX], *data;
	struct patch *p;
	int error;

	if (table_find(&img->patches, nr))
		return true; /* it was read back before, and includes later writes */
	error = io_read_raw(img, copy, img->bs, nr << img->bits);
	if (error || !is_as_it_was(img, leaf, first, count, copy))
		return block_is_free(img, nr) || block_find(img, nr); /* it no longer belongs to a file */
	data = *memory >= img->bs ? malloc(img->bs) : NULL;
	p = data ? table_put(&img->patches, nr) : NULL;
	if (p) {
		*memory -= img->bs;
		p->data = memcpy(data, copy, img->bs);
		return true;
	}
	free(data);
	pthread_mutex_lock(&img->sums_lock);
	for (uint32_t i = 0; i < count; i++)
		if (leaf->sum[first + i])
			put_sum(img, unit + i, leaf->sum[first + i], leaf->ino[first + i]);
	pthread_mutex_unlock(&img->sums_lock);
	return !io_write1(img, copy, img->bs, nr << img->bits);
}

static void keep_leaf(x3_image *img, const struct patch *p, uint64_t *memory)
{
	const struct leaf *leaf = (struct leaf *)p->data;
	uint32_t shift = img->bits - unit_bits(img), count = 1u << shift;

	for (uint32_t first = 0; leaf && first < UNITS; first += count) {
		uint32_t i = first;
		while (i < first + count && !leaf->sum[i])
			i++;
		if (i < first + count &&
		    !keep_block(img, ((uint64_t)p->nr * UNITS + first) >> shift, leaf, first, count, memory))
			lose(img, leaf->ino[i]);
	}
}

/*
 * If a barrier has failed and nobody has handled it yet, keep what it may have lost.
 *
 * Return whether one has. With the lock, in the committing thread; drops the lock while others read without
 * it.
 */
bool unsynced_judge(x3_image *img)
{
	bool before = img->draining;
	struct sums all;
	uint64_t memory;

	if (!unsynced_is_unjudged(img))
		return false;
	img->draining = true;
	while (img->readers)
		pthread_cond_wait(&img->wake, &img->lock);
	img->draining = before;
	pthread_mutex_lock(&img->sums_lock);
	sums_join(img);
	all = img->syncing;
	img->syncing = (struct sums){ 0 };
	/* A barrier that is under way does not cover the data kept from now on. */
	__atomic_fetch_add(&img->failures, 1, __ATOMIC_SEQ_CST);
	img->unjudged = false;
	pthread_mutex_unlock(&img->sums_lock);
	memory = memory_to_keep_it(img);
	if (all.table.n)
		redo_spoil(img);
	for (uint32_t i = 0; all.table.n && i <= all.table.mask; i++)
		if (all.table.slot[i].used)
			keep_leaf(img, &all.table.slot[i], &memory);
	img->data_lost |= all.broken;
	sums_free(&all);
	return true;
}

/* Before any new attempt: write home what was kept. In the committing thread; drops the lock. */
int unsynced_home(x3_image *img)
{
	int error;

	if (!img->patches.n)
		return 0;
	while (img->atoms)
		pthread_cond_wait(&img->wake, &img->lock);
	do {
		pthread_mutex_unlock(&img->lock);
		error = patches_home(img, AT_A_TIME);
		pthread_mutex_lock(&img->lock);
	} while (error == -EAGAIN);
	return error;
}
