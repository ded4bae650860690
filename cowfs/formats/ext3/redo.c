/*
 * The redo log: what operations have changed since the last commit, where the death of this process
 * leaves it.
 *
 * It is the last quarter of the journal's blocks, which our log, that never goes round, does not come to:
 * one block with a header, then two areas, which the transactions use in turn by the lowest bit of their
 * number. While one transaction is being committed its area is kept; when that is done nobody needs it.
 * Each operation appends one record with the bytes that it has changed, before its result is told. That
 * is a write into the page cache of the image's file, and no more: nothing waits for the disk. So a record
 * outlives us, but not the machine: the header says which start of the machine it is good for, since what
 * the record builds upon (the data of files above all) may not have come to the disk when the power went.
 *
 * A record counts if the header was written since this machine was started and this filesystem was last
 * mounted, if its own checksum is right, if all records of its transaction before it are there, and if
 * its transaction is the first that the journal does not have, or the second, and then only behind all of the
 * first. Whoever recovers the journal, or mounts, leaves numbers out or sets the time of the mount: then no
 * record counts any more.
 *
 * Others take the log to end where our blocks begin: none of them begins with the magic number of the
 * journal in the place where they look.
 *
 * Changes between x3_begin() and x3_end() are one record. An operation for which the area has no room is not
 * acknowledged before its transaction is in the journal, and nothing else is meanwhile: redo.lost. If the record
 * cannot be written the operation fails.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>
#include <ext2fs/ext2fs.h>

#include "internal.h"

#define REDO_MAX (8u << 20) /* bytes, however large the journal is */
#define APART 8             /* bytes that are the same and yet part of a piece: its head costs as much */
#define PIECE_MAX 32768u

struct redo_header {
	char magic[8];
	uint32_t crc; /* of the rest */
	uint32_t mounted_at;
	char boot[40]; /* which start of the machine */
	uint8_t uuid[16];
	uint64_t session; /* of all records that count */
	uint32_t area, reserved; /* area: blocks in each of the two */
};
struct record { /* is followed by pieces */
	uint32_t magic, crc; /* of what follows, and of them */
	uint64_t session;
	uint32_t tid, number; /* of the record, within the transaction */
	uint32_t length;      /* bytes, with this */
	uint32_t previous;    /* how many records the transaction before had */
};
struct piece { /* is followed by *length* bytes */
	uint32_t nr;
	uint16_t offset, length; /* length 0: all of the block is zero */
};
static const char magic[8] = "cowfsRDO";
#define RECORD_MAGIC 0x4f445221u

/* Which of the journal's blocks are ours. */
void redo_layout(x3_image *img)
{
	uint32_t blocks = min(img->jlen / 4, max(REDO_MAX >> img->bits, 64u));

	img->jend = img->jlen - blocks;
	img->redo.area = (blocks - 1) / 2;
}

static uint32_t area_start(const x3_image *img, uint32_t tid)
{
	return img->jend + 1 + (tid & 1) * img->redo.area;
}

static size_t area_size(const x3_image *img)
{
	return (size_t)img->redo.area << img->bits;
}

/* Read or write within the journal, from byte *at* of its block *first* on. */
static int journal_io(x3_image *img, uint32_t first, size_t at, char *buf, size_t len, bool to_write)
{
	while (len) {
		uint32_t i = first + (at >> img->bits), skip = at & (img->bs - 1), k = 1;
		while (((size_t)k << img->bits) < skip + len && img->jmap[i + k] == img->jmap[i] + k)
			k++;
		size_t n = min(len, ((size_t)k << img->bits) - skip);
		uint64_t off = ((uint64_t)img->jmap[i] << img->bits) + skip;
		int error = to_write ? io_write1(img, buf, n, off) : io_read_raw(img, buf, n, off);
		if (error)
			return error;
		buf += n, at += n, len -= n;
	}
	return 0;
}

/* Which start of the machine this is; false: not known. */
static bool this_boot(const x3_image *img, char boot[40])
{
	int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, boot, 36);

	if (fd >= 0)
		close(fd);
	memset(boot + 36, 0, 4);
	if (img->debug & X3_OTHER_BOOT)
		boot[0] ^= 1;
	return n == 36;
}

static uint32_t header_crc(const struct redo_header *h)
{
	return ext2fs_crc32c_le(~0u, (const unsigned char *)&h->mounted_at, sizeof *h - offsetof(struct redo_header, mounted_at));
}

static uint32_t record_crc(const struct record *r)
{
	return ext2fs_crc32c_le(~0u, (const unsigned char *)&r->session, r->length - offsetof(struct record, session));
}


/* --- writing --- */

/*
 * Begin a log without a record. Not while there is anything that is not committed.
 *
 * A file without a name is lost with us: it needs none.
 */
int redo_start(x3_image *img)
{
	struct redo_header header = { .mounted_at = img->sb->s_mtime, .area = img->redo.area };
	char *block;
	struct stat st;
	int error;

	img->redo.on = false;
	img->redo.count = img->redo.at = img->redo.used = 0;
	img->redo.tid = img->tid;
	img->redo.lost = false;
	if (fstat(img->fd, &st) || (S_ISREG(st.st_mode) && !st.st_nlink) || !this_boot(img, header.boot))
		return 0;
	if (getrandom(&header.session, sizeof header.session, GRND_NONBLOCK) < 0)
		header.session = now_ns();
	memcpy(header.magic, magic, sizeof magic);
	memcpy(header.uuid, img->sb->s_uuid, sizeof header.uuid);
	header.crc = header_crc(&header);
	block = calloc(1, img->bs);
	if (!block)
		return -ENOMEM;
	memcpy(block, &header, sizeof header);
	error = journal_io(img, img->jend, 0, block, img->bs, true);
	free(block);
	img->redo.session = header.session;
	img->redo.on = !error;
	return error;
}

/* What the records build upon is lost: let none of them count. */
void redo_drop(x3_image *img)
{
	struct redo_header none = { 0 };

	if (img->redo.on)
		journal_io(img, img->jend, 0, (char *)&none, sizeof none, true);
	img->redo.on = false;
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
	struct piece piece = { nr, offset, length };

	if (!redo_room(img, sizeof piece + length))
		return false;
	memcpy(img->redo.buf + img->redo.used, &piece, sizeof piece);
	if (length)
		memcpy(img->redo.buf + img->redo.used + sizeof piece, bytes, length);
	img->redo.used += sizeof piece + length;
	return true;
}

/* The first byte from *i* on, below *end*, that is not the same; or *end*. *old* NULL: zeros. */
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

/* Put down what differs of *length* bytes of a block. */
static bool put_difference(x3_image *img, uint32_t nr, uint32_t offset, uint32_t length, const char *old, const char *new)
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

/* Whether the same bytes are put down anyway: the counts of blocks, say, are changed again and again. */
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

/* Write the record that was collected; -errno. Positive: there is no room for it in the area. */
static int write_record(x3_image *img)
{
	size_t length = (img->redo.used + 7) & ~(size_t)7;
	struct record *r;
	int error;

	if (img->redo.broken || !redo_room(img, 8))
		return -ENOMEM;
	if (img->redo.at + length > area_size(img))
		return 1;
	memset(img->redo.buf + img->redo.used, 0, length - img->redo.used);
	r = (struct record *)img->redo.buf;
	*r = (struct record){ RECORD_MAGIC,    0,      img->redo.session, img->tid,
			      img->redo.count, length, img->redo.previous };
	r->crc = record_crc(r);
	error = journal_io(img, area_start(img, img->tid), img->redo.at, img->redo.buf, length, true);
	if (!error)
		img->redo.at += length;
	return error;
}

/*
 * Write down what was collected. -errno if that fails and may be told (*may_fail*): then it did not happen.
 * Otherwise it has to wait for the commit.
 */
static int write_down(x3_image *img, bool may_fail)
{
	int error = 0;

	if (img->redo.tid != img->tid) {
		img->redo.previous = img->redo.tid + 1 == img->tid ? img->redo.count : 0;
		img->redo.tid = img->tid;
		img->redo.at = img->redo.count = 0;
	}
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
	img->redo.count += !error; /* be it a gap, which ends the transaction */
	if (img->redo.at > area_size(img) / 4 * 3 && img->due != img->tid) {
		img->due = img->tid;
		pthread_cond_broadcast(&img->wake);
	}
	return error;
}

/* After an operation, which has changed something. -errno: it must be undone, unless that is out of the question. */
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

/* What was collected belonged together, and is complete. */
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


/* --- reading --- */

/* Read the header, and say whether the log is of this start of the machine and this mount. */
static int read_header(x3_image *img, bool *good)
{
	struct redo_header header;
	char boot[40];
	int error = journal_io(img, img->jend, 0, (char *)&header, sizeof header, false);

	*good = !error && !memcmp(header.magic, magic, sizeof magic) && header.crc == header_crc(&header) &&
		header.area == img->redo.area && header.mounted_at == img->mounted_at &&
		!memcmp(header.uuid, img->sb->s_uuid, sizeof header.uuid) && this_boot(img, boot) &&
		!memcmp(header.boot, boot, sizeof boot);
	img->redo.session = header.session;
	return error;
}

/* How many bytes of an area are records of *tid*, one after the other; and how many they are. */
static size_t good_records(x3_image *img, const char *area, uint32_t tid, uint32_t *count)
{
	size_t at = 0, size = area_size(img);
	struct record r;

	for (*count = 0; at + sizeof r <= size; at += r.length, ++*count) {
		memcpy(&r, area + at, sizeof r);
		if (r.magic != RECORD_MAGIC || r.session != img->redo.session || r.tid != tid || r.number != *count ||
		    r.length < sizeof r || r.length % 8 || r.length > size - at ||
		    record_crc((const struct record *)(area + at)) != r.crc)
			break;
	}
	return at;
}

/* Read the records of the two transactions that the journal does not have. */
static int read_areas(x3_image *img)
{
	uint32_t count = 0, before = 0;

	for (int i = 0; i < 2; i++) {
		uint32_t tid = img->committed + 1 + i;
		char *area = img->redo.area ? malloc(area_size(img)) : NULL;
		int error = area ? journal_io(img, area_start(img, tid), 0, area, area_size(img), false) : -ENOMEM;
		img->redo.found[i] = area;
		if (error)
			return error;
		img->redo.length[i] = good_records(img, area, tid, &count);
		if (i == 1 && count && (!before || ((const struct record *)area)->previous != before))
			img->redo.length[i] = count = 0; /* something before it is missing */
		before = count;
		img->redone += count;
	}
	return 0;
}

/* Find the records that count; img->redone is how many there are. After replay_find(). */
int redo_find(x3_image *img)
{
	bool good = false;
	int error = img->stale ? 0 : read_header(img, &good);

	return error || !good ? error : read_areas(img);
}

void redo_forget(x3_image *img)
{
	for (int i = 0; i < 2; i++) {
		free(img->redo.found[i]);
		img->redo.found[i] = NULL;
		img->redo.length[i] = 0;
	}
}

/* Do something with each piece of a transaction; -EBADMSG if one makes no sense. */
static int each_piece(x3_image *img, int i,
		      int (*do_it)(x3_image *img, const struct piece *piece, const char *bytes))
{
	const char *p = img->redo.found[i], *end = p + img->redo.length[i];
	int error = 0;

	while (p < end && !error) {
		const char *stop = p + ((const struct record *)p)->length;
		struct piece piece;
		for (p += sizeof(struct record); (size_t)(stop - p) >= sizeof piece && !error; p += piece.length) {
			memcpy(&piece, p, sizeof piece);
			p += sizeof piece;
			if (piece.nr >= img->blocks || piece.length > stop - p || piece.offset + piece.length > img->bs)
				return -EBADMSG;
			error = do_it(img, &piece, p);
		}
		p = stop;
	}
	return error;
}

static int show_piece(x3_image *img, const struct piece *piece, const char *bytes)
{
	int error;
	char *data = patch_data(img, piece->nr, &error);

	if (!data)
		return error;
	if (piece->length)
		memcpy(data + piece->offset, bytes, piece->length);
	else
		memset(data, 0, img->bs);
	return 0;
}

/* Let the image look as it does with all that was found; in memory. */
int redo_show(x3_image *img)
{
	int error = each_piece(img, 0, show_piece);

	return error ? error : each_piece(img, 1, show_piece);
}

static int do_piece(x3_image *img, const struct piece *piece, const char *bytes)
{
	if (piece->length)
		memcpy(block_change(img, block_get(img, piece->nr), piece->offset, piece->length), bytes, piece->length);
	else
		block_fresh(img, piece->nr);
	return 0;
}

/* Commit one of the transactions, under its own number. */
static int redo_one(x3_image *img, int i)
{
	int64_t error;

	CHANGE (img) {
		error = each_piece(img, i, do_piece);
		if (error)
			fail(img, -error, "the redo log is damaged");
	}
	error = op_finish(&op);
	return error ? error : x3_commit(img);
}

/*
 * Commit what was found. However far this comes, the journal and what is left of the log are good for the
 * rest. Then write it home: the log may know blocks that are free now.
 */
int redo_commit(x3_image *img)
{
	int error = 0;

	for (int i = 0; i < 2 && !error; i++)
		if (img->redo.length[i])
			error = redo_one(img, i);
	return error ? error : x3_checkpoint(img);
}
