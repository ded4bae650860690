/*
 * Writing the redo log (redo_log.h).
 *
 * Before the result of an operation is returned, one record with the bytes that it has changed is appended. This
 * is a write to the page cache of the image's file: nothing waits for the disk. Changes between x3_begin() and
 * x3_end() are one record.
 *
 * If the ring has no room for a record, its operation is not acknowledged before its transaction is in the
 * journal, and neither is any other until then: redo.lost. If a record cannot be written, the operation fails.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>

#include "internal.h"
#include "redo_log.h"

#define APART 4 /* equal bytes between two differences that still belong to one piece: a new header takes as much */
#define PIECE_MAX 0x7fffu

/*
 * Begin an empty log. Call it only when everything is committed.
 *
 * A file without a name disappears with this process: it needs no log.
 */
int redo_start(x3_image *img)
{
	struct redo_header header = { .mounted_at = img->sb->s_mtime, .blocks = img->redo.blocks };
	char *block;
	struct stat st;
	int error;
	bool known = redo_boot(img, header.boot);

	img->redo.on = false;
	img->redo.count = img->redo.used = 0;
	img->redo.head = img->redo.first = img->redo.needed = 0;
	img->redo.tid = 0;
	img->redo.lost = false;
	if (fstat(img->fd, &st) || (S_ISREG(st.st_mode) && !st.st_nlink) || !known)
		return 0;
	if (getrandom(&header.session, sizeof header.session, GRND_NONBLOCK) < 0)
		header.session = now_ns();
	memcpy(header.magic, redo_magic, sizeof redo_magic);
	memcpy(header.uuid, img->sb->s_uuid, sizeof header.uuid);
	header.crc = redo_header_crc(&header);
	block = calloc(1, img->bs);
	if (!block)
		return -ENOMEM;
	memcpy(block, &header, sizeof header);
	error = redo_io(img, img->jend, 0, block, img->bs, true);
	free(block);
	img->redo.session = header.session;
	img->redo.on = !error;
	return error;
}

/* The base of the records is lost: make all of them invalid. */
void redo_drop(x3_image *img)
{
	struct redo_header none = { 0 };

	if (img->redo.on)
		redo_io(img, img->jend, 0, (char *)&none, sizeof none, true);
	img->redo.on = false;
}

/*
 * The base of the records may be lost if we die before it is home: make the existing ones invalid. From now
 * on an operation is acknowledged when it is in the journal, until everything before it is there.
 */
void redo_spoil(x3_image *img)
{
	struct start none[2] = { { 0 } };

	if (!img->redo.on)
		return;
	redo_io(img, img->jend, sizeof(struct redo_header), (char *)none, sizeof none, true);
	img->redo.lost = true;
	img->redo.lost_tid = img->tid;
}

static bool redo_room(x3_image *img, size_t more)
{
	char *buf = try_grow(img->redo.buf, &img->redo.cap, img->redo.used + more, 1);

	if (buf)
		img->redo.buf = buf;
	return buf != NULL;
}

static bool put_piece(x3_image *img, uint32_t nr, uint32_t offset, uint32_t length, const char *bytes)
{
	bool other = img->redo.used == sizeof(struct record) || nr != img->redo.nr;
	struct piece piece = { offset, length | (other ? OTHER_BLOCK : 0) };
	char *p;

	if (!redo_room(img, sizeof piece + sizeof nr + length))
		return false;
	p = img->redo.buf + img->redo.used;
	memcpy(p, &piece, sizeof piece);
	p += sizeof piece;
	if (other) {
		memcpy(p, &nr, sizeof nr);
		p += sizeof nr;
		img->redo.nr = nr;
	}
	if (length)
		memcpy(p, bytes, length);
	img->redo.used = p + length - img->redo.buf;
	return true;
}

/* The first byte from *i* on, below *end*, that differs; or *end*. *old* NULL: zeros. */
static uint32_t differs_at(const char *old, const char *new, uint32_t i, uint32_t end)
{
	uint64_t a = 0, b;

	for (; i + 8 <= end; i += 8) {
		memcpy(&b, new + i, 8);
		if (old)
			memcpy(&a, old + i, 8);
		if (a != b)
			return i + __builtin_ctzll(a ^ b) / 8;
	}
	while (i < end && new[i] == (old ? old[i] : 0))
		i++;
	return i;
}

/* Record the differences in *length* bytes of a block. */
static bool put_difference(x3_image *img, uint32_t nr, uint32_t offset, uint32_t length, const char *old,
			   const char *new)
{
	uint32_t begin = differs_at(old, new, 0, length), end, next;

	for (; begin < length; begin = next) {
		for (end = next = begin; next < length && next < end + APART && next < begin + PIECE_MAX; next++)
			if (new[next] != (old ? old[next] : 0))
				end = next + 1;
		if (!put_piece(img, nr, offset + begin, end - begin, new + begin))
			return false;
		next = differs_at(old, new, end, length);
	}
	return true;
}

/* Whether the same bytes are recorded anyway: counters of blocks, for instance, change again and again. */
static bool is_repeated(const struct change *c, const struct change *first)
{
	for (int i = 1; i <= 12 && c - i >= first; i++)
		if (c[-i].block == c->block && c[-i].offset == c->offset && c[-i].length == c->length)
			return true;
	return false;
}

static bool put_changes(x3_image *img)
{
	bool good = true;

	if (!img->redo.used) {
		good = redo_room(img, sizeof(struct record));
		img->redo.used = sizeof(struct record);
	}
	for (size_t i = 0; i < img->undo.n && good; i++) {
		const struct change *c = &img->undo.change[i];
		const char *data = c->block->data;
		if (is_repeated(c, img->undo.change))
			continue;
		if (c->length)
			good = put_difference(img, c->block->nr, c->offset, c->length, img->undo.bytes + c->old,
					      data + c->offset);
		else
			good = put_piece(img, c->block->nr, 0, 0, NULL) &&
			       put_difference(img, c->block->nr, 0, img->bs, NULL, data);
	}
	return good;
}

/* A transaction has its first record: write its place to the header. */
static int write_start(x3_image *img, struct start s)
{
	s.crc = redo_start_crc(img, &s);
	return redo_io(img, img->jend, sizeof(struct redo_header) + (s.tid & 1) * sizeof s, (char *)&s, sizeof s, true);
}

/* Write the collected record; -errno. Positive: there is no room for it. */
static int write_record(x3_image *img)
{
	uint64_t size = redo_ring_size(img), head = img->redo.head, at = head % size;
	size_t length = (img->redo.used + 3) & ~(size_t)3;
	struct record *r;
	int error;

	if (img->redo.broken || !redo_room(img, 4))
		return -ENOMEM;
	if (at + length > size) {
		head += size - at;
		at = 0;
	}
	if (head + length > img->redo.needed + size)
		return 1;
	if (!img->redo.count) {
		img->redo.first = head;
		error = write_start(img, (struct start){ 0, img->tid, at, img->redo.previous });
		if (error)
			return error;
	}
	memset(img->redo.buf + img->redo.used, 0, length - img->redo.used);
	r = (struct record *)img->redo.buf;
	r->length = length;
	r->crc = redo_record_crc(img, img->tid, img->redo.count, r);
	error = redo_io(img, img->jend + 1, at, img->redo.buf, length, true);
	if (!error)
		img->redo.head = head + length;
	return error;
}

/*
 * Before a record is written: find which earlier ones are still needed, and whether it is a transaction's
 * first.
 */
static void look_around(x3_image *img)
{
	if (img->redo.tid != img->tid) {
		bool follows = img->redo.tid + 1 == img->tid;
		img->redo.previous = follows ? img->redo.count : 0;
		img->redo.needed = follows ? img->redo.first : img->redo.head;
		img->redo.first = img->redo.head;
		img->redo.tid = img->tid;
		img->redo.count = 0;
	}
	if (!tid_after(img->tid - 1, img->committed))
		img->redo.needed = img->redo.first;
}

/*
 * Write the collected record. -errno if that fails and may be reported (*may_fail*): then the operation did
 * not happen. Otherwise it waits for the commit.
 */
static int write_down(x3_image *img, bool may_fail)
{
	int error = 0;

	look_around(img);
	if (!img->redo.lost || img->redo.lost_tid != img->tid) {
		error = write_record(img);
		if (error > 0 || (error && !may_fail)) {
			img->redo.lost = true;
			img->redo.lost_tid = img->tid;
			error = 0;
		}
	}
	img->redo.used = 0;
	img->redo.broken = false;
	img->redo.count += !error; /* also for a gap, which ends the valid records of the transaction */
	if (img->redo.head - img->redo.needed > redo_ring_size(img) / 4 * 3)
		ask_commit(img);
	return error;
}

/* Whether the ring is nearly full of records that are still needed. */
bool redo_is_much(x3_image *img)
{
	return img->redo.on && img->redo.head - img->redo.needed > redo_ring_size(img) / 8 * 7;
}

/* After an operation that changed something. -errno: undo it, unless that is impossible. */
int redo_note(x3_image *img, bool may_fail)
{
	int error = 0;

	if (!img->redo.on || !img->undo.n)
		return 0;
	img->redo.broken |= !put_changes(img);
	if (!img->atoms)
		error = write_down(img, may_fail);
	if (error)
		snprintf(img->message, sizeof img->message, "the log cannot be written: %s", strerror(-error));
	return error;
}

/* The collected changes belong together and are complete. */
void redo_flush(x3_image *img)
{
	if (img->redo.used)
		write_down(img, false);
}

/* Whether nothing may be acknowledged before redo.lost_tid is in the journal. */
bool redo_is_lost(x3_image *img)
{
	if (img->redo.lost && !tid_after(img->redo.lost_tid, img->committed))
		img->redo.lost = false;
	return img->redo.lost;
}
