/*
 * The redo log: what operations have changed since the last commit, where the death of this process
 * leaves it.
 *
 * It is the last quarter of the journal's blocks, which our log, that never goes round, does not come to:
 * one block with a header, then a ring of records. The records of a transaction are needed until it is
 * committed; the header says where those of the last two begin, for there is one that is running and
 * perhaps one that is being committed. Each operation appends one record with the bytes that it has changed, before its result is told. That
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
 * Changes between x3_begin() and x3_end() are one record. An operation for which the ring has no room is not
 * acknowledged before its transaction is in the journal, and nothing else is meanwhile: redo.lost. If the record
 * cannot be written the operation fails.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>
#include <ext2fs/ext2fs.h>

#include "internal.h"

#define REDO_MAX (8u << 20) /* bytes, however large the journal is */
#define APART 4             /* bytes that are the same and yet part of a piece: its head costs as much */
#define OTHER_BLOCK 0x8000u
#define PIECE_MAX 0x7fffu

struct redo_header {
	char magic[8];
	uint32_t crc; /* of the rest */
	uint32_t mounted_at;
	char boot[40]; /* which start of the machine */
	uint8_t uuid[16];
	uint64_t session;          /* of all records that count */
	uint32_t blocks, reserved; /* blocks: in the ring */
};
struct start {        /* two of them follow the header: of a transaction with an even number, and an odd one */
	uint32_t crc; /* of the session, and of the rest */
	uint32_t tid;
	uint32_t at;       /* where in the ring its first record is */
	uint32_t previous; /* how many records the transaction before had */
};
struct record {          /* is followed by pieces; never goes round the end of the ring */
	uint32_t crc;    /* of its place in the order of all, and of what follows */
	uint32_t length; /* bytes, with this */
};
struct piece {                   /* is followed by the number of the block, with OTHER_BLOCK, and by *length* bytes */
	uint16_t offset, length; /* length 0: all of the block is zero */
};
typedef int (*piece_fn)(x3_image *img, uint32_t nr, const struct piece *piece, const char *bytes);
static const char magic[8] = "cowfsRDO";

/* Which of the journal's blocks are ours. */
void redo_layout(x3_image *img)
{
	uint32_t blocks = min(img->jlen / 4, max(REDO_MAX >> img->bits, 64u));

	img->jend = img->jlen - blocks;
	img->redo.blocks = blocks - 1;
}

static uint64_t ring_size(const x3_image *img)
{
	return (uint64_t)img->redo.blocks << img->bits;
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

/*
 * Which start of the machine this is; false: not known. It is read when the first image is opened: a daemon that
 * serves sees no /proc any more.
 */
static bool this_boot(const x3_image *img, char boot[40])
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	static char known[40];
	bool good;

	pthread_mutex_lock(&lock);
	if (!known[0]) {
		int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
		if (fd < 0 || read(fd, known, 36) != 36)
			known[0] = 0;
		if (fd >= 0)
			close(fd);
	}
	good = known[0];
	memcpy(boot, known, sizeof known);
	pthread_mutex_unlock(&lock);
	if (img->debug & X3_OTHER_BOOT)
		boot[0] ^= 1;
	return good;
}

static uint32_t header_crc(const struct redo_header *h)
{
	return ext2fs_crc32c_le(~0u, (const unsigned char *)&h->mounted_at,
				sizeof *h - offsetof(struct redo_header, mounted_at));
}

static uint32_t start_crc(const x3_image *img, const struct start *s)
{
	uint32_t crc = ext2fs_crc32c_le(~0u, (const unsigned char *)&img->redo.session, sizeof img->redo.session);

	return ext2fs_crc32c_le(crc, (const unsigned char *)&s->tid, sizeof *s - offsetof(struct start, tid));
}

static uint32_t record_crc(const x3_image *img, uint32_t tid, uint32_t number, const struct record *r)
{
	struct {
		uint64_t session;
		uint32_t tid, number;
	} order = { img->redo.session, tid, number };
	uint32_t crc = ext2fs_crc32c_le(~0u, (const unsigned char *)&order, sizeof order);

	return ext2fs_crc32c_le(crc, (const unsigned char *)&r->length, r->length - offsetof(struct record, length));
}


/* --- writing --- */

/*
 * Begin a log without a record. Not while there is anything that is not committed.
 *
 * A file without a name is lost with us: it needs none.
 */
int redo_start(x3_image *img)
{
	struct redo_header header = { .mounted_at = img->sb->s_mtime, .blocks = img->redo.blocks };
	char *block;
	struct stat st;
	int error;
	bool known = this_boot(img, header.boot);

	img->redo.on = false;
	img->redo.count = img->redo.used = 0;
	img->redo.head = img->redo.first = img->redo.needed = 0;
	img->redo.tid = 0;
	img->redo.lost = false;
	if (fstat(img->fd, &st) || (S_ISREG(st.st_mode) && !st.st_nlink) || !known)
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

/*
 * What the records build upon may be lost, if we die before it has been brought home: let none that there are count.
 * What is done from now on is acknowledged when it is in the journal, until that is with all before it.
 */
void redo_spoil(x3_image *img)
{
	struct start none[2] = { { 0 } };

	if (!img->redo.on)
		return;
	journal_io(img, img->jend, sizeof(struct redo_header), (char *)none, sizeof none, true);
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

/* A transaction has its first record: let the header say where. */
static int write_start(x3_image *img, struct start s)
{
	s.crc = start_crc(img, &s);
	return journal_io(img, img->jend, sizeof(struct redo_header) + (s.tid & 1) * sizeof s, (char *)&s, sizeof s,
			  true);
}

/* Write the record that was collected; -errno. Positive: there is no room for it. */
static int write_record(x3_image *img)
{
	uint64_t size = ring_size(img), head = img->redo.head, at = head % size;
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
	r->crc = record_crc(img, img->tid, img->redo.count, r);
	error = journal_io(img, img->jend + 1, at, img->redo.buf, length, true);
	if (!error)
		img->redo.head = head + length;
	return error;
}

/* Before a record is written: which of those before it are needed, and whether it is a transaction's first. */
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
 * Write down what was collected. -errno if that fails and may be told (*may_fail*): then it did not happen.
 * Otherwise it has to wait for the commit.
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
	img->redo.count += !error; /* be it a gap, which ends the transaction */
	if (img->redo.head - img->redo.needed > ring_size(img) / 4 * 3)
		ask_commit(img);
	return error;
}

/* Whether it is nearly full of what is needed. */
bool redo_is_much(x3_image *img)
{
	return img->redo.on && img->redo.head - img->redo.needed > ring_size(img) / 8 * 7;
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
		header.blocks == img->redo.blocks && header.mounted_at == img->mounted_at &&
		!memcmp(header.uuid, img->sb->s_uuid, sizeof header.uuid) && this_boot(img, boot) &&
		!memcmp(header.boot, boot, sizeof boot);
	img->redo.session = header.session;
	return error;
}

/* Add the records of *tid* that there are in the ring, one after the other, to *found*; return how many. */
static int64_t good_records(x3_image *img, const char *ring, struct start s, struct found *found)
{
	uint64_t size = ring_size(img), at = s.at, count = 0;
	bool again = false; /* it has gone round */

	while (at <= size) {
		const struct record *r = (const struct record *)(ring + at);
		if (at + sizeof *r <= size && r->length >= sizeof *r && r->length % 4 == 0 && r->length <= size - at &&
		    record_crc(img, s.tid, count, r) == r->crc) {
			char *data = try_grow(found->data, &found->cap, found->length + r->length, 1);
			if (!data)
				return -ENOMEM;
			found->data = data;
			memcpy(data + found->length, r, r->length);
			found->length += r->length;
			at += r->length;
			count++;
		} else if (!again) {
			again = true;
			at = 0;
		} else {
			break;
		}
	}
	return count;
}

/* Read the records of the two transactions that the journal does not have. */
static int read_ring(x3_image *img, const char *ring)
{
	int64_t before = 0;

	for (int i = 0; i < 2; i++) {
		struct start s;
		uint32_t tid = img->committed + 1 + i;
		int64_t count = journal_io(img, img->jend, sizeof(struct redo_header) + (tid & 1) * sizeof s,
					   (char *)&s, sizeof s, false);
		if (count < 0)
			return count;
		if (s.tid != tid || s.crc != start_crc(img, &s) || s.at % 4 || s.at >= ring_size(img))
			break;
		if (i == 1 && (!before || s.previous != before))
			break; /* something before it is missing */
		count = good_records(img, ring, s, &img->redo.found[i]);
		if (count < 0)
			return count;
		before = count;
		img->redone += count;
	}
	return 0;
}

static int read_records(x3_image *img)
{
	uint64_t size = ring_size(img);
	char *ring = malloc(size);
	int error = ring ? journal_io(img, img->jend + 1, 0, ring, size, false) : -ENOMEM;

	if (!error)
		error = read_ring(img, ring);
	free(ring);
	return error;
}

/* Do something with each piece of a record, which ends at *end*; -EBADMSG if one is invalid. */
static int pieces_of(x3_image *img, const char *p, const char *end, piece_fn do_it)
{
	uint32_t nr = UINT32_MAX;
	int error = 0;

	while ((size_t)(end - p) >= sizeof(struct piece) && !error) {
		struct piece piece;
		memcpy(&piece, p, sizeof piece);
		p += sizeof piece;
		if (piece.length & OTHER_BLOCK) {
			if ((size_t)(end - p) < sizeof nr)
				return -EBADMSG;
			memcpy(&nr, p, sizeof nr);
			p += sizeof nr;
			piece.length &= ~OTHER_BLOCK;
		}
		if (nr >= img->blocks || piece.length > end - p || piece.offset + piece.length > img->bs)
			return -EBADMSG;
		error = do_it(img, nr, &piece, p);
		p += piece.length;
	}
	return error;
}

/* The same for each record of a transaction. */
static int each_piece(x3_image *img, int i, piece_fn do_it)
{
	const char *p = img->redo.found[i].data, *end = p ? p + img->redo.found[i].length : NULL;
	int error = 0;

	for (uint32_t length; p < end && !error; p += length) {
		length = ((const struct record *)p)->length;
		error = pieces_of(img, p + sizeof(struct record), p + length, do_it);
	}
	return error;
}

/* It is one, and that is all; but each block that it is in takes memory, and a transaction has so many at most. */
static int check_piece(x3_image *img, uint32_t nr, const struct piece *piece, const char *bytes)
{
	(void)piece, (void)bytes;
	if (!table_put(&img->redo.seen, nr))
		return -ENOMEM;
	return img->redo.seen.n > 2 * img->dirty_max + 1024 ? -EBADMSG : 0;
}

/* Find the records that count; img->redone is how many there are. After replay_find(). */
int redo_find(x3_image *img)
{
	bool good = false;
	int error = img->stale ? 0 : read_header(img, &good);

	if (error || !good)
		return error;
	error = read_records(img);
	for (int i = 0; i < 2 && !error; i++) {
		error = each_piece(img, i, check_piece);
		table_free(&img->redo.seen);
	}
	if (error == -EBADMSG)
		snprintf(img->message, sizeof img->message, "the redo log is damaged");
	return error;
}

void redo_forget(x3_image *img)
{
	for (int i = 0; i < 2; i++) {
		free(img->redo.found[i].data);
		img->redo.found[i] = (struct found){ 0 };
	}
}

/* More blocks than two transactions and what is in the journal can have: nobody has written that. */
static uint32_t blocks_max(const x3_image *img)
{
	return 2 * img->jlen;
}

static int show_piece(x3_image *img, uint32_t nr, const struct piece *piece, const char *bytes)
{
	int error = -EBADMSG;
	char *data = img->patches.n < blocks_max(img) ? patch_data(img, nr, &error) : NULL;

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

static int do_piece(x3_image *img, uint32_t nr, const struct piece *piece, const char *bytes)
{
	if (img->ndirty >= blocks_max(img))
		return -EBADMSG;
	if (piece->length)
		memcpy(block_change(img, block_get(img, nr), piece->offset, piece->length), bytes, piece->length);
	else
		block_fresh(img, nr);
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
		if (img->redo.found[i].length)
			error = redo_one(img, i);
	return error ? error : x3_checkpoint(img);
}
