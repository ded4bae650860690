/* Reading the redo log (redo_log.h): finding the records that count, and applying them or committing them. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"
#include "redo_log.h"

typedef int (*piece_fn)(x3_image *img, uint32_t nr, const struct piece *piece, const char *bytes);

/* Read the header; return whether the log is of this boot of the machine and of this mount. */
static int read_header(x3_image *img, bool *good)
{
	struct redo_header header;
	char boot[40];
	int error = redo_io(img, img->jend, 0, (char *)&header, sizeof header, false);

	*good = !error && !memcmp(header.magic, redo_magic, sizeof redo_magic) &&
		header.crc == redo_header_crc(&header) && header.blocks == img->redo.blocks &&
		header.mounted_at == img->mounted_at && !memcmp(header.uuid, img->sb->s_uuid, sizeof header.uuid) &&
		redo_boot(img, boot) && !memcmp(header.boot, boot, sizeof boot);
	img->redo.session = header.session;
	return error;
}

/* Add all records of *tid* in the ring, in order, to *found*; return how many. */
static int64_t good_records(x3_image *img, const char *ring, struct start s, struct found *found)
{
	uint64_t size = redo_ring_size(img), at = s.at, count = 0;
	bool again = false; /* the position has wrapped around */

	while (at <= size) {
		const struct record *r = (const struct record *)(ring + at);
		if (at + sizeof *r <= size && r->length >= sizeof *r && r->length % 4 == 0 && r->length <= size - at &&
		    redo_record_crc(img, s.tid, count, r) == r->crc) {
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
		int64_t count = redo_io(img, img->jend, sizeof(struct redo_header) + (tid & 1) * sizeof s, (char *)&s,
					sizeof s, false);
		if (count < 0)
			return count;
		if (s.tid != tid || s.crc != redo_start_crc(img, &s) || s.at % 4 || s.at >= redo_ring_size(img))
			break;
		if (i == 1 && (!before || s.previous != before))
			break; /* an earlier record is missing */
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
	uint64_t size = redo_ring_size(img);
	char *ring = malloc(size);
	int error = ring ? redo_io(img, img->jend + 1, 0, ring, size, false) : -ENOMEM;

	if (!error)
		error = read_ring(img, ring);
	free(ring);
	return error;
}

/* Call *do_it* for each piece of a record, which ends at *end*; -EBADMSG if one is invalid. */
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

/* Count the blocks of a transaction: each takes memory, and a valid one has a limited number. */
static int check_piece(x3_image *img, uint32_t nr, const struct piece *piece, const char *bytes)
{
	(void)piece, (void)bytes;
	if (!table_put(&img->redo.seen, nr))
		return -ENOMEM;
	return img->redo.seen.n > 2 * img->dirty_max + 1024 ? -EBADMSG : 0;
}

/* Find the valid records; img->redone is their number. Call it after replay_find(). */
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

/* The most blocks that two transactions and the journal can have. A log with more is not valid. */
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

/* Apply everything that was found to the image, in memory. */
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
 * Commit what was found. Wherever this is interrupted, the journal and the rest of the log suffice to
 * complete it. Then write it home: the log may contain blocks that are free now.
 */
int redo_commit(x3_image *img)
{
	int error = 0;

	for (int i = 0; i < 2 && !error; i++)
		if (img->redo.found[i].length)
			error = redo_one(img, i);
	return error ? error : x3_checkpoint(img);
}
