/*
 * The redo log on disk: what operations have changed since the last commit, where the death of this process
 * leaves it.
 *
 * The log is the last quarter of the journal's blocks, which our jbd2 log never reaches, because it never wraps
 * around: one block with a header, then a ring of records. The records of a transaction are needed until it is
 * committed. The header says where those of the last two begin: one runs, and one may be being committed.
 *
 * A record survives our death, but not that of the machine: what it builds upon (file data above all) may not
 * have reached the disk when the power failed. So a record counts only if
 * - the header was written since this start of the machine, and since this filesystem was last mounted;
 * - its checksum is right, and all earlier records of its transaction are there;
 * - its transaction is the first that the journal does not have, or the second, and then only after all of the
 *   first.
 * Whoever else recovers the journal skips transaction numbers, and whoever else mounts sets the time of the
 * mount: then no record counts any more.
 *
 * Other programs find the end of the journal's log where our blocks begin: none of them begins with the
 * journal's magic number.
 */
#ifndef COWFS_EXT3_REDO_LOG_H
#define COWFS_EXT3_REDO_LOG_H

#include "internal.h"

#define OTHER_BLOCK 0x8000u

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

extern const char redo_magic[8];

static inline uint64_t redo_ring_size(const x3_image *img)
{
	return (uint64_t)img->redo.blocks << img->bits;
}

int redo_io(x3_image *img, uint32_t first, size_t at, char *buf, size_t len, bool to_write);
bool redo_boot(const x3_image *img, char boot[40]);
uint32_t redo_header_crc(const struct redo_header *h);
uint32_t redo_start_crc(const x3_image *img, const struct start *s);
uint32_t redo_record_crc(const x3_image *img, uint32_t tid, uint32_t number, const struct record *r);

#endif
