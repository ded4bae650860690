/*
 * A fuzzer of the ext3 engine. An input is a series of operations on an image, mixed with damage to it.
 *
 *   bases.c      the sound images that runs begin with, and the places of their structures
 *   damage.c     changes to an image that no filesystem would make; forged journals and redo logs
 *   walk.c       reads everything in an image
 *   operations.c what programs do with an image
 *   run.c        runs an input
 *   mutate.c     makes an input from others, for libFuzzer
 *   standalone.c runs given inputs without libFuzzer
 *
 * An input is an array of records, and any bytes are a record. Each record does something or is skipped; the first
 * selects the image. So nothing is parsed, and every change to an input makes another valid input.
 */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine.h"

struct record {
	uint8_t op, a;
	uint16_t b;
	uint32_t c, d, e;
};
#define RECORDS_MAX 200

enum op {
	/* what programs do */
	LIST,
	CREATE,
	CREATE_MANY,
	WRITE,
	READ,
	TRUNCATE,
	SEGMENTS,
	REMOVE,
	REMOVE_MANY,
	RENAME,
	LINK,
	SET_XATTR,
	REMOVE_XATTR,
	GET_XATTRS,
	SET_ATTR,
	LOOK,
	RELEASE,
	SYNC_ONE,
	COMMIT_ALL,
	CHECKPOINT,
	TOGETHER,
	INJECT,
	CRASH,
	CLOSE,
	SUSPEND,
	SWITCH,
	WALK,
	LINK_MANY,
	SCATTER,
	OPERATIONS,
	/* from PATCH on: what only an attacker or a failing disk does */
	PATCH = 32,
	COPY,
	FILL,
	CUT,
	FORGE_LOG,
	LOG,
	FORGE_REDO,
	REDO,
	DAMAGES,
	CODES = 64 /* unused codes do nothing, so that saved inputs keep their meaning */
};

static inline enum op what(const struct record *r)
{
	return r->op % CODES;
}

/* The structures of an image that damage aims at. images.py writes them in this order. */
enum region {
	SUPERBLOCK,
	GROUPS,
	BITMAPS,
	INODES,
	DIRECTORIES,
	INDEXES,
	INDIRECT,
	XATTRS,
	JOURNAL,
	JOURNAL_LOG,
	REDO_HEAD,
	REDO_RING,
	CONTENTS,
	ANYWHERE,
	REGIONS
};

struct piece {
	uint32_t at, length; /* bytes */
};
struct base {
	unsigned char *data;
	uint32_t size, block_size;
	struct {
		uint32_t n;
		struct piece *piece;
	} region[REGIONS];
};

#define KNOWN_MAX 64
#define KEPT_MAX 16

/* One run. */
struct world {
	const struct base *base;
	int fd;
	unsigned char *image; /* the file, mapped */
	uint64_t size;        /* of the file */
	x3_image *img;        /* NULL: not open */
	struct record first;
	bool read_only;
	bool damaged;  /* the image may be damaged */
	bool injected; /* a system call may have failed since the image was opened */
	bool in_doubt; /* a system call may have failed since the image was made */
	int atoms;
	uint32_t boot;                     /* the boot of the machine: 0 or X3_OTHER_BOOT */
	uint32_t known[KNOWN_MAX], nknown; /* inodes seen so far; the first is the root */
	uint32_t kept[KEPT_MAX], nkept;    /* kept inodes without a name */
	uint32_t log_at, next_tid;         /* of the forged log */
};

/* --- bases.c --- */

#define ROOM_TO_GROW (256u << 10)
void bases_load(void);
const struct base *base_of(unsigned number);
void world_begin(struct world *w, const struct base *base);
void world_resize(struct world *w, uint64_t size);

/* --- damage.c --- */

bool is_damage(const struct record *r);
const struct record *damage(struct world *w, const struct record *r, const struct record *end);

/* --- walk.c --- */

struct name {
	uint32_t ino;
	struct x3_place place;
	uint8_t type, length;
	char name[256];
};
void finding(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
int64_t check(struct world *w, int64_t result);
bool attributes(struct world *w, uint32_t ino, struct x3_attr *attr);
bool is_directory(struct world *w, uint32_t ino);
uint32_t list(struct world *w, uint32_t dir, struct name *names, uint32_t most);
bool find(struct world *w, uint32_t dir, const char *name, uint32_t length, struct name *found);
void know(struct world *w, uint32_t ino);
uint64_t walk(struct world *w, uint32_t most);

/* --- files.c --- */

void file_operation(struct world *w, const struct record *r);

/* --- operations.c --- */

uint32_t pick(const struct world *w, uint32_t index);
void operation(struct world *w, const struct record *r);
void close_image(struct world *w);
