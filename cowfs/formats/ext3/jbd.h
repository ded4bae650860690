/*
 * The format of a journal in Linux (include/linux/jbd2.h). All numbers are big-endian.
 */
#pragma once
#include <stdint.h>

#define JBD_MAGIC 0xC03B3998u
enum { DESCRIPTOR = 1, COMMIT = 2, SUPERBLOCK_V1 = 3, SUPERBLOCK_V2 = 4, REVOKE = 5 };
enum { ESCAPED = 1, SAME_UUID = 2, LAST_TAG = 8 };
#define INCOMPAT_REVOKE 1u

struct header {
	uint32_t magic, type, sequence;
};
struct tag { /* without 64bit and checksums; the UUID follows unless SAME_UUID */
	uint32_t nr;
	uint16_t checksum, flags;
};
struct commit_block {
	struct header header;
	uint8_t checksum[4 + 32];
	uint64_t sec;
	uint32_t nsec;
} __attribute__((packed));
struct revoke_block { /* the block numbers follow */
	struct header header;
	uint32_t used; /* bytes, including this header */
};
struct journal_super {
	struct header header;
	uint32_t block_size, blocks, first;
	uint32_t sequence, start; /* of the oldest transaction in the log; start 0: the log is empty */
	uint32_t error, compat, incompat, ro_compat;
	uint8_t uuid[16];
};
