/*
 * Recovery after a crash: find the transactions in the journal, show the image with them, and write them home.
 *
 * The rules are those of fs/jbd2/recovery.c. A transaction is valid if it has its commit block; the log ends at the
 * first incomplete transaction. If a transaction revokes a block, the block is not recovered from it or an older one.
 *
 * Finding does not write: img->patches records for each block where the journal has its newest content, and io_read()
 * returns that. So an image that is opened read-only looks as it would after the recovery. An image that is opened for
 * writing is checked in the same way before anything is written.
 *
 * The contents of the journal are not trusted: a walk takes at most as many steps as the journal has blocks.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"
#include "jbd.h"


/* --- tables of blocks --- */

static struct patch *slot_of(const struct table *table, uint32_t nr)
{
	uint32_t i = nr * 2654435761u;

	for (i ^= i >> 15;; i++) {
		struct patch *p = &table->slot[i & table->mask];
		if (!p->used || p->nr == nr)
			return p;
	}
}

struct patch *table_find(const struct table *table, uint32_t nr)
{
	struct patch *p = table->n ? slot_of(table, nr) : NULL;

	return p && p->used ? p : NULL;
}

/* The entry of a block, which is made if missing; NULL: no memory. */
struct patch *table_put(struct table *table, uint32_t nr)
{
	struct patch *p;

	if (!table->slot || table->n >= table->mask / 2) {
		uint32_t size = table->slot ? 2 * (table->mask + 1) : 256;
		struct table bigger = { calloc(size, sizeof *p), size - 1, table->n };
		if (!bigger.slot)
			return NULL;
		for (uint32_t i = 0; table->slot && i <= table->mask; i++)
			if (table->slot[i].used)
				*slot_of(&bigger, table->slot[i].nr) = table->slot[i];
		free(table->slot);
		*table = bigger;
	}
	p = slot_of(table, nr);
	if (!p->used) {
		*p = (struct patch){ .nr = nr, .used = true };
		table->n++;
	}
	return p;
}

void table_free(struct table *table)
{
	for (uint32_t i = 0; table->slot && i <= table->mask; i++)
		free(table->slot[i].data);
	free(table->slot);
	*table = (struct table){ 0 };
}


/* --- what io_read() sees --- */

/* A part of a block, from *skip* on, as recovery sees it. */
static int patch_read(x3_image *img, const struct patch *p, char *buf, uint32_t skip, uint32_t len)
{
	uint32_t magic = htonl(JBD_MAGIC);
	int error;

	if (p->data) {
		memcpy(buf, p->data + skip, len);
		return 0;
	}
	error = io_read_raw(img, buf, len, ((uint64_t)p->source << img->bits) + skip);
	for (uint32_t i = skip; p->escaped && !error && i < 4 && i < skip + len; i++)
		buf[i - skip] = ((char *)&magic)[i];
	return error;
}

/* Update *buf*, which was read at *off*, with what is not home yet. */
int patches_read(x3_image *img, char *buf, size_t len, uint64_t off)
{
	uint64_t end = off + len;
	int error = 0;

	for (uint64_t nr = off >> img->bits; nr << img->bits < end && nr < img->blocks && !error; nr++) {
		const struct patch *p = table_find(&img->patches, nr);
		uint64_t begin = max(off, nr << img->bits), stop = min(end, (nr + 1) << img->bits);
		if (p)
			error = patch_read(img, p, buf + (begin - off), begin & (img->bs - 1), stop - begin);
	}
	return error;
}

/* The content of a block in memory, where the caller may change it. NULL: *error*. */
char *patch_data(x3_image *img, uint32_t nr, int *error)
{
	struct patch *p = table_put(&img->patches, nr);
	char *data = p && !p->data ? malloc(img->bs) : NULL;

	*error = -ENOMEM;
	if (!p || p->data)
		/* Nothing was allocated. NOLINTNEXTLINE(clang-analyzer-unix.Malloc) */
		return p ? p->data : NULL;
	if (!data)
		return NULL;
	*error = p->source ? patch_read(img, p, data, 0, img->bs)
			   : io_read_raw(img, data, img->bs, (uint64_t)nr << img->bits);
	if (*error) {
		free(data);
		return NULL;
	}
	return p->data = data;
}


/* --- walking through the log --- */

enum pass { SCAN, TAGS, REVOKES, BLOCKS };
struct walk {
	x3_image *img;
	enum pass pass;
	char *block;           /* the present block */
	uint32_t at, sequence; /* its position, and the transaction that it must belong to */
	uint32_t steps;
	uint32_t end;          /* the first incomplete transaction; set by SCAN */
	uint64_t committed_at; /* when the last one was committed, in seconds; 0: unknown */
	struct table
		logged; /* blocks in the log; if *escaped*, *source* is the last transaction that revokes the block */
};

static int damaged(x3_image *img, const char *what)
{
	snprintf(img->message, sizeof img->message, "the journal is damaged: %s", what);
	return -EBADMSG;
}

/* Go to the next block; false: the whole journal was read. */
static bool step(struct walk *w)
{
	if (++w->at == w->img->jlen)
		w->at = w->img->jfirst;
	return ++w->steps <= w->img->jlen - w->img->jfirst;
}

/* Record that a block is in the log: only for such blocks, a revocation matters. */
static int note_tag(struct walk *w, uint32_t nr)
{
	if (nr >= w->img->blocks || journal_has(w->img, nr, 1))
		return damaged(w->img, "it has blocks that it cannot have");
	return table_put(&w->logged, nr) ? 0 : -ENOMEM;
}

/* Recover one block of a transaction, at the present position of the walk. */
static int take_block(struct walk *w, uint32_t nr, bool escaped)
{
	struct patch *revoked = table_find(&w->logged, nr), *p;

	if (revoked && revoked->escaped && !tid_after(w->sequence, revoked->source))
		return 0;
	p = table_put(&w->img->patches, nr);
	if (!p)
		return -ENOMEM;
	p->source = w->img->jmap[w->at];
	p->escaped = escaped;
	return 0;
}

/* Read the blocks that follow a descriptor block. Positive: some are missing. */
static int walk_descriptor(struct walk *w)
{
	uint32_t offset = sizeof(struct header);
	struct tag tag = { 0 };

	while (!(ntohs(tag.flags) & LAST_TAG) && offset + sizeof tag <= w->img->bs) {
		memcpy(&tag, w->block + offset, sizeof tag);
		offset += sizeof tag + (ntohs(tag.flags) & SAME_UUID ? 0 : 16);
		if (w->steps >= w->img->jlen - w->img->jfirst)
			return 1;
		int error = w->pass == TAGS     ? note_tag(w, ntohl(tag.nr))
			    : w->pass == BLOCKS ? take_block(w, ntohl(tag.nr), ntohs(tag.flags) & ESCAPED)
						: 0;
		if (error)
			return error;
		step(w);
	}
	return 0;
}

static int walk_revoke(struct walk *w)
{
	const struct revoke_block *revoke = (const struct revoke_block *)w->block;
	uint32_t used = ntohl(revoke->used);

	if (used < sizeof *revoke || used > w->img->bs)
		return damaged(w->img, "a revoke block is invalid");
	for (uint32_t offset = sizeof *revoke; offset + 4 <= used; offset += 4) {
		uint32_t nr;
		memcpy(&nr, w->block + offset, 4);
		nr = ntohl(nr);
		if (nr >= w->img->blocks)
			return damaged(w->img, "it revokes a block that does not exist");
		struct patch *p = table_find(&w->logged, nr);
		if (p) {
			p->source = w->sequence; /* the walk goes through the transactions in order */
			p->escaped = true;
		}
	}
	return 0;
}

/* Walk through the log once. */
static int walk(struct walk *w, enum pass pass)
{
	x3_image *img = w->img;
	const struct journal_super *super = (const struct journal_super *)img->jsb;
	const struct header *header = (const struct header *)w->block;
	int error = 0;

	w->pass = pass;
	w->at = ntohl(super->start);
	w->sequence = ntohl(super->sequence);
	w->steps = 0;
	while (!error && (pass == SCAN || w->sequence != w->end)) {
		error = io_read_raw(img, w->block, img->bs, (uint64_t)img->jmap[w->at] << img->bits);
		if (error || ntohl(header->magic) != JBD_MAGIC || ntohl(header->sequence) != w->sequence || !step(w))
			break;
		if (ntohl(header->type) == DESCRIPTOR) {
			error = walk_descriptor(w);
		} else if (ntohl(header->type) == COMMIT) {
			w->committed_at = __builtin_bswap64(((const struct commit_block *)w->block)->sec);
			w->sequence++;
		} else if (ntohl(header->type) == REVOKE) {
			error = pass == REVOKES ? walk_revoke(w) : 0;
		} else {
			break;
		}
	}
	if (pass == SCAN)
		w->end = w->sequence;
	return error < 0 ? error : 0;
}


/* --- the recovery --- */

bool journal_is_in_use(const x3_image *img)
{
	return ((const struct journal_super *)img->jsb)->start != 0;
}

static int find(struct walk *w)
{
	x3_image *img = w->img;
	int error = walk(w, SCAN);

	/*
	 * If the flag is missing, another program has cleared it or restored an old superblock. If nobody has mounted
	 * the filesystem since, the log is still valid. Otherwise the kernel has ignored it, and it is out of date.
	 */
	img->stale = !(img->opened.incompat & EXT3_FEATURE_INCOMPAT_RECOVER) && w->committed_at &&
		     img->mounted_at > w->committed_at;
	img->replayed = w->end - ntohl(((const struct journal_super *)img->jsb)->sequence);
	img->committed = w->end - 1;
	if (error || img->stale || !img->replayed)
		return error;
	error = walk(w, TAGS);
	error = error ? error : walk(w, REVOKES);
	return error ? error : walk(w, BLOCKS);
}

/*
 * Find the blocks in the journal that are not home, as img->patches; img->committed is its last transaction.
 *
 * If a driver that ignores the journal has mounted the filesystem since, set img->stale, and make no patches.
 */
int replay_find(x3_image *img)
{
	struct walk w = { .img = img, .block = malloc(img->bs) };
	int error = w.block ? find(&w) : -ENOMEM;

	free(w.block);
	table_free(&w.logged);
	return error;
}

static int by_number(const void *a, const void *b)
{
	uint32_t x = (*(struct patch *const *)a)->nr, y = (*(struct patch *const *)b)->nr;

	return (x > y) - (x < y);
}

/* Write some of them home, and mark them once they are on disk. *block*: space for one. */
static int some_home(x3_image *img, struct patch *const *some, uint32_t n, char *block)
{
	uint64_t patched = __atomic_load_n(&img->patched, __ATOMIC_SEQ_CST);
	int error = 0;

	for (uint32_t i = 0; i < n && !error; i++) {
		error = patch_read(img, some[i], block, 0, img->bs);
		if (!error)
			error = io_write1(img, block, img->bs, (uint64_t)some[i]->nr << img->bits);
	}
	error = error ? error : io_barrier(img);
	pthread_mutex_lock(&img->lock);
	for (uint32_t i = 0; i < n && !error && patched == img->patched; i++)
		some[i]->home = true;
	pthread_mutex_unlock(&img->lock);
	return error;
}

/*
 * Write home what is in img->patches, and forget it; *most* blocks, then a barrier. If it is interrupted, it
 * can be repeated. Without the lock; nothing may be added meanwhile.
 */
int patches_home(x3_image *img, uint32_t most)
{
	struct patch **all = malloc((img->patches.n + 1) * sizeof *all);
	char *block = malloc(img->bs);
	uint32_t n = 0;
	int error = all && block ? 0 : -ENOMEM;

	for (uint32_t i = 0; !error && img->patches.n && i <= img->patches.mask; i++)
		if (img->patches.slot[i].used && !img->patches.slot[i].home)
			all[n++] = &img->patches.slot[i];
	if (!error)
		qsort(all, n, sizeof *all, by_number);
	for (uint32_t i = 0; i < n && !error; i += min(most, n - i))
		error = some_home(img, all + i, min(most, n - i), block);
	if (!error) {
		pthread_mutex_lock(&img->lock);
		for (uint32_t i = 0; i < n; i++)
			error = all[i]->home ? error : -EAGAIN; /* it was written to meanwhile */
		if (!error)
			table_free(&img->patches); /* the cache has been read from them */
		pthread_mutex_unlock(&img->lock);
	}
	free(all);
	free(block);
	return error;
}
