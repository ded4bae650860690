/*
 * The redo log on disk: the changes since the last commit. They survive the death of this process.
 *
 * The log takes the last quarter of the journal's blocks, which the engine's jbd2 log never reaches, because it never
 * wraps around. It is one block with a header, then a ring of records. The records of a transaction are needed until it
 * is committed. The header says where those of the last two transactions begin: the running one, and the one that may
 * be being committed.
 *
 * A record does not survive a crash of the machine: the data that it depends on (mostly file data) may not have reached
 * the disk. So a record is valid only if
 * - the header was written since this boot of the machine, and since this filesystem was last mounted;
 * - its checksum is right, and all earlier records of its transaction exist;
 * - its transaction is the first that the journal does not have, or the second, after all records of the first.
 * Another program that recovers the journal skips transaction numbers, and one that mounts the filesystem sets the time
 * of the mount. Either makes all records invalid.
 *
 * To other programs, the journal's log ends where the redo log begins: none of its blocks begins with the journal's
 * magic number.
 */
#ifndef COWFS_EXT3_REDO_LOG_H
#define COWFS_EXT3_REDO_LOG_H

#include "internal.h"

#define OTHER_BLOCK 0x8000u

struct redo_header {
	char magic[8];
	uint32_t crc; /* of the rest */
	uint32_t mounted_at;
	char boot[40]; /* the ID of this boot of the machine */
	uint8_t uuid[16];
	uint64_t session;          /* of all valid records */
	uint32_t blocks, reserved; /* blocks: in the ring */
};
struct start {        /* two of them follow the header: of a transaction with an even number, and an odd one */
	uint32_t crc; /* of the session, and of the rest */
	uint32_t tid;
	uint32_t at;       /* the position of its first record in the ring */
	uint32_t previous; /* the number of records of the transaction before */
};
struct record {          /* pieces follow; a record never wraps around the end of the ring */
	uint32_t crc;    /* of its number among all records, and of the rest */
	uint32_t length; /* bytes, including this header */
};
struct piece {                   /* the number of the block follows, with OTHER_BLOCK, and *length* bytes */
	uint16_t offset, length; /* length 0: the whole block is zero */
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
