/*
 * Damage: changes to an image that no filesystem would make. They are written to the file, whether the image is open or
 * not, because its owner can write to it at any time.
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <ext2fs/ext2_fs.h>
#include <ext2fs/ext2fs.h>

#include "fuzz.h"
#include "jbd.h"

#define WILD 0x8000u /* in e: a number that this image does not have */

bool is_damage(const struct record *r)
{
	return what(r) >= PATCH;
}

/* A piece of the image that lies within the file; NULL: none. */
static const struct piece *piece_of(const struct world *w, uint32_t region, uint32_t index)
{
	const struct piece *p;

	region %= REGIONS;
	if (!w->base->region[region].n)
		return NULL;
	p = &w->base->region[region].piece[index % w->base->region[region].n];
	return p->length && p->at + (uint64_t)p->length <= w->size ? p : NULL;
}

static uint32_t block_of(const struct world *w, uint32_t region, uint32_t index)
{
	const struct piece *p = piece_of(w, region, index);

	return p ? p->at / w->base->block_size : 0;
}

/* a: region, b: piece, c: offset, d: value; e: width, byte order, and how. */
static void patch(struct world *w, const struct record *r)
{
	const struct piece *p = piece_of(w, r->a, r->b);
	uint32_t width = 1u << (r->e & 3), at;
	uint64_t value = 0, new = r->d;

	width = width > 4 ? 4 : width;
	if (!p || p->length < width)
		return;
	at = p->at + r->c % (p->length - width + 1);
	memcpy(&value, w->image + at, width);
	if (r->e & 4)
		value = ntohl((uint32_t)value) >> (32 - 8 * width);
	switch (r->e >> 3 & 3) {
	case 1:
		new = value ^ r->d;
		break;
	case 2:
		new = value + (int32_t)r->d;
		break;
	case 3:
		new = block_of(w, r->d >> 16, r->d & 0xffff);
		break;
	}
	if (r->e & 4)
		new = htonl((uint32_t)new << (32 - 8 * width));
	memcpy(w->image + at, &new, width);
}

/* a, b: from; c, d: to; e: how much of it. */
static void copy(struct world *w, const struct record *r)
{
	const struct piece *from = piece_of(w, r->a, r->b), *to = piece_of(w, r->c, r->d);
	uint32_t length = r->e;

	if (!from || !to)
		return;
	length = length && length < from->length ? length : from->length;
	length = length < to->length ? length : to->length;
	memmove(w->image + to->at, w->image + from->at, length);
}

static void fill(struct world *w, const struct record *r)
{
	const struct piece *p = piece_of(w, r->a, r->b);
	uint32_t from;

	if (!p)
		return;
	from = r->c % p->length;
	memset(w->image + p->at + from, r->d, r->e && r->e < p->length - from ? r->e : p->length - from);
}


/* --- a forged journal --- */

/* Block number *i* of the log; NULL: its place is unknown. */
static unsigned char *log_block(const struct world *w, uint32_t i)
{
	const struct piece *p = i < w->base->region[JOURNAL_LOG].n ? piece_of(w, JOURNAL_LOG, i) : NULL;

	return p ? w->image + p->at : NULL;
}

struct descriptor {
	uint32_t n;
	const struct record *tag[24];
};

static struct header *log_header(struct world *w, uint32_t type)
{
	struct header *header = (struct header *)log_block(w, w->log_at);

	if (!header)
		return NULL;
	w->log_at++;
	memset(header, 0, w->base->block_size);
	*header = (struct header){ htonl(JBD_MAGIC), htonl(type), htonl(w->next_tid) };
	return header;
}

/* Add a block to the transaction: a copy of the block at its place, with one number changed. */
static void log_data(struct world *w, const struct record *r)
{
	const struct piece *p = piece_of(w, r->a >> 2, r->b);
	unsigned char *block = log_block(w, w->log_at++);
	uint32_t size = w->base->block_size, at;

	if (!block)
		return;
	if (p && p->at / size * (uint64_t)size + size <= w->size)
		memcpy(block, w->image + p->at / size * size, size);
	at = ((p ? p->at % size : 0) + r->c) % (size - 3);
	memcpy(block + at, &r->d, 4);
}

/* Write the descriptor with the collected tags, and their blocks. */
static void log_flush(struct world *w, struct descriptor *d)
{
	struct header *header = d->n ? log_header(w, DESCRIPTOR) : NULL;
	char *p = header ? (char *)(header + 1) : NULL;

	for (uint32_t i = 0; header && i < d->n; i++) {
		const struct record *r = d->tag[i];
		bool last = i == d->n - 1 && !(r->e & 4), uuid = !i || r->e & 2;
		uint32_t nr = r->e & WILD ? r->d : block_of(w, r->a >> 2, r->b);
		struct tag tag = { htonl(nr), 0, 0 };
		tag.flags = htons((uuid ? 0 : SAME_UUID) | (last ? LAST_TAG : 0) | (r->e & 1 ? ESCAPED : 0));
		memcpy(p, &tag, sizeof tag);
		p += sizeof tag + (uuid ? 16 : 0);
	}
	for (uint32_t i = 0; header && i < d->n; i++)
		log_data(w, d->tag[i]);
	d->n = 0;
}

static void log_revoke(struct world *w, const struct record *r)
{
	struct revoke_block *revoke = (struct revoke_block *)log_header(w, REVOKE);
	uint32_t *nr, n = 1 + r->e % 8;

	if (!revoke)
		return;
	nr = (uint32_t *)(revoke + 1);
	for (uint32_t i = 0; i < n; i++)
		nr[i] = htonl(r->e & WILD ? r->d + i : block_of(w, r->c, r->b + i));
	revoke->used = htonl(r->e & 0x4000 ? r->d : sizeof *revoke + 4 * n);
}

static void log_commit(struct world *w, const struct record *r)
{
	struct commit_block *commit = (struct commit_block *)log_header(w, COMMIT);

	if (commit && r->e & 1)
		commit->sec = __builtin_bswap64(r->d);
	w->next_tid += r->e & 2 ? r->c : 1;
}

/* Forge a log from the LOG records that follow. Their a & 3: 0 and 1 a block, 2 a revoke block, 3 a commit block. */
static const struct record *forge_log(struct world *w, const struct record *r, const struct record *end)
{
	const struct piece *journal = piece_of(w, JOURNAL, 0);
	struct ext2_super_block *sb = (struct ext2_super_block *)(w->image + 1024);
	struct descriptor d = { 0 };
	struct journal_super *super;

	if (!journal || w->size < 2048)
		return r;
	super = (struct journal_super *)(w->image + journal->at);
	w->log_at = 0;
	w->next_tid = ntohl(super->sequence);
	super->start = super->first;
	super->incompat |= htonl(INCOMPAT_REVOKE);
	if (!(r->e & 1))
		sb->s_feature_incompat |= EXT3_FEATURE_INCOMPAT_RECOVER;
	for (r++; r < end && what(r) == LOG; r++) {
		if ((r->a & 3) < 2) {
			d.tag[d.n++] = r;
			if (d.n == 24 || r->e & 4)
				log_flush(w, &d);
			continue;
		}
		log_flush(w, &d);
		(r->a & 3) == 2 ? log_revoke(w, r) : log_commit(w, r);
	}
	log_flush(w, &d);
	return r - 1;
}


/* --- a forged redo log: its layout is in redo_log.h --- */

struct redo_header {
	char magic[8];
	uint32_t crc, mounted_at;
	char boot[40];
	uint8_t uuid[16];
	uint64_t session;
	uint32_t blocks, reserved;
};
struct start {
	uint32_t crc, tid, at, previous;
};
#define NEXT_RECORD 0x400u
#define NEXT_TRANSACTION 0x800u
#define ZERO 0x1000u
#define REDO_BYTES (16u << 10)

struct redo {
	struct world *w;
	unsigned char *head; /* the block with the header */
	uint32_t tid, count, previous, record, used;
	unsigned char bytes[REDO_BYTES]; /* the ring, from its beginning */
};

static uint32_t crc_of(uint32_t crc, const void *data, size_t length)
{
	return ext2fs_crc32c_le(crc, data, length);
}

static void redo_begin(struct redo *redo, unsigned char *head)
{
	struct redo_header *h = (struct redo_header *)head;
	const struct ext2_super_block *sb = (struct ext2_super_block *)(redo->w->image + 1024);
	int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);

	redo->head = head;
	*h = (struct redo_header){ .mounted_at = sb->s_mtime,
				   .session = 1,
				   .blocks = redo->w->base->region[REDO_RING].n };
	memcpy(h->magic, "cowfsRDO", 8);
	memcpy(h->uuid, sb->s_uuid, 16);
	if (fd >= 0 && read(fd, h->boot, 36) == 36)
		close(fd);
	h->boot[0] ^= redo->w->boot != 0;
	h->crc = crc_of(~0u, &h->mounted_at, sizeof *h - offsetof(struct redo_header, mounted_at));
}

static void redo_end_record(struct redo *redo)
{
	struct {
		uint64_t session;
		uint32_t tid, number;
	} order = { 1, redo->tid, redo->count };
	uint32_t *record = (uint32_t *)(redo->bytes + redo->record);

	redo->used = (redo->used + 3) & ~3u;
	record[1] = redo->used - redo->record;
	record[0] = crc_of(crc_of(~0u, &order, sizeof order), record + 1, record[1] - 4);
	redo->record = redo->used;
	redo->used += 8;
	redo->count++;
}

static void redo_start_transaction(struct redo *redo)
{
	struct start s = { 0, redo->tid, redo->record, redo->previous };
	uint64_t session = 1;

	s.crc = crc_of(crc_of(~0u, &session, 8), &s.tid, sizeof s - 4);
	memcpy(redo->head + sizeof(struct redo_header) + (s.tid & 1) * sizeof s, &s, sizeof s);
}

static void redo_piece(struct redo *redo, const struct record *r)
{
	struct world *w = redo->w;
	uint32_t size = w->base->block_size, length = r->e & ZERO ? 0 : r->e & 0x3ff;
	const struct piece *p = piece_of(w, r->a, r->b);
	uint32_t at = p ? (p->at + r->c % p->length) % size : r->c % size;
	uint32_t nr = r->e & WILD ? r->d : block_of(w, r->a, r->b);
	uint16_t head[2] = { at, length | 0x8000 };
	unsigned char *out = redo->bytes + redo->used;
	uint64_t from = (uint64_t)nr * size + at;

	if (redo->used + 16 + length > REDO_BYTES)
		return;
	if (!(r->e & 0x2000) && at + length > size)
		head[1] = (size - at) | 0x8000, length = size - at;
	memcpy(out, head, 4);
	memcpy(out + 4, &nr, 4);
	if (from + length <= w->size)
		memcpy(out + 8, w->image + from, length);
	else
		memset(out + 8, 0, length);
	memcpy(out + 8, &r->d, length < 4 ? length : 4);
	redo->used += 8 + length;
}

/* Forge a redo log from the REDO records that follow; see redo_piece(). */
static const struct record *forge_redo(struct world *w, const struct record *r, const struct record *end)
{
	static struct redo redo;
	const struct piece *journal = piece_of(w, JOURNAL, 0), *head = piece_of(w, REDO_HEAD, 0);
	struct journal_super *super;

	if (!journal || !head || w->size < 2048)
		return r;
	super = (struct journal_super *)(w->image + journal->at);
	if (!super->start)
		super->start = super->first;
	memset(&redo, 0, sizeof redo);
	redo.w = w;
	redo.tid = w->next_tid ? w->next_tid : ntohl(super->sequence);
	redo.used = 8;
	redo_begin(&redo, w->image + head->at);
	redo_start_transaction(&redo);
	for (r++; r < end && what(r) == REDO && redo.used + 64 < REDO_BYTES; r++) {
		redo_piece(&redo, r);
		if (r->e & (NEXT_RECORD | NEXT_TRANSACTION))
			redo_end_record(&redo);
		if (r->e & NEXT_TRANSACTION) {
			redo.previous = redo.count;
			redo.count = 0;
			redo.tid++;
			redo_start_transaction(&redo);
		}
	}
	redo_end_record(&redo);
	for (uint32_t i = 0, at = 0; at < redo.record; i++, at += w->base->block_size) {
		const struct piece *p = piece_of(w, REDO_RING, i);
		uint32_t length = redo.record - at;
		if (p)
			memcpy(w->image + p->at, redo.bytes + at, length < p->length ? length : p->length);
	}
	return r - 1;
}

/* Do the damage of a record and of those that belong to it; return the last one. */
const struct record *damage(struct world *w, const struct record *r, const struct record *end)
{
	w->damaged = true;
	switch (what(r)) {
	case PATCH:
		patch(w, r);
		break;
	case COPY:
		copy(w, r);
		break;
	case FILL:
		fill(w, r);
		break;
	case CUT:
		world_resize(w, r->c % (w->base->size + 1));
		break;
	case FORGE_LOG:
		return forge_log(w, r, end);
	case FORGE_REDO:
		return forge_redo(w, r, end);
	default:
		break;
	}
	return r;
}
