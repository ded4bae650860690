/*
 * What programs do with the data and attributes of one file, according to the rules for callers in engine.h.
 */
#include <string.h>

#include "fuzz.h"

#define SPREAD 300u /* bytes written far apart at a time */

static void fill_value(unsigned char *p, uint32_t length, uint32_t seed)
{
	if (seed % 5 == 0) { /* a block that looks like one of the journal */
		memset(p, 0, length);
		if (length >= 8)
			memcpy(p, "\xc0\x3b\x39\x98\0\0\0\1", 8);
		return;
	}
	for (uint32_t i = 0; i < length; i++, seed = seed * 1664525 + 1013904223)
		p[i] = seed >> 24;
}

/* An offset in a file: near its beginning, where the next level of indirect blocks begins, or far away. */
static uint64_t offset_of(const struct world *w, uint32_t number)
{
	uint64_t bs = w->base->block_size, per = bs / 4, near = number >> 3;

	switch (number & 7) {
	case 0:
	case 1:
	case 2:
		return near % (20 * bs);
	case 3:
		return (12 + near % 8) * bs - near % 3;
	case 4:
		return (12 + per - 2 + near % 6) * bs;
	case 5:
		return (12 + per + per * per - 2 + near % 6) * bs + near % 5;
	case 6:
		return (uint64_t)near << (near & 15);
	}
	return (uint64_t)near << 32;
}

static void write_one(struct world *w, const struct record *r)
{
	static unsigned char data[70000];
	uint32_t length = r->c % (r->a & 1 ? sizeof data : 3000);

	fill_value(data, length, r->e);
	check(w, x3_write(w->img, pick(w, r->b), data, length, offset_of(w, r->d)));
}

/* Write single bytes far apart, so that each has its own indirect blocks. */
static void scatter(struct world *w, const struct record *r)
{
	uint64_t step = w->base->block_size / 4 * (uint64_t)w->base->block_size;

	for (uint32_t i = 0; i < r->c % SPREAD; i++)
		check(w, x3_write(w->img, pick(w, r->b), "x", 1, (r->d % 7 + i) * step));
}

static void read_one(struct world *w, const struct record *r)
{
	static char data[70000];

	check(w, x3_read(w->img, pick(w, r->b), data, r->c % sizeof data, offset_of(w, r->d)));
}

static void segments(struct world *w, const struct record *r)
{
	uint64_t from = offset_of(w, r->d), stop = 0;

	for (int i = 0; i < 50 && check(w, x3_segment(w->img, pick(w, r->b), from, &stop)) >= 0; i++)
		from = stop;
}

static const char *xattr_name(uint32_t number)
{
	static const char *names[] = {
		"user.a",
		"user.b",
		"trusted.overlay.origin",
		"trusted.overlay.opaque",
		"security.capability",
		"system.posix_acl_access",
		"system.posix_acl_default",
		"user.",
		"other.x",
		"user.long name long name long name long name long name long name long name long name long name",
	};
	return names[number % 10];
}

static void set_xattr(struct world *w, const struct record *r)
{
	static const unsigned char acl[] = { 2, 0, 0,   0,   1,   0,   6,  0, 255, 255, 255, 255, 2,   0,  4,
					     0, 1, 0,   0,   0,   4,   0,  4, 0,   255, 255, 255, 255, 16, 0,
					     4, 0, 255, 255, 255, 255, 32, 0, 0,   0,   255, 255, 255, 255 };
	static unsigned char value[66000];
	const char *name = xattr_name(r->c);
	uint32_t length = r->d % (r->a & 4 ? sizeof value : r->a & 8 ? 1000 : 60);

	fill_value(value, length, r->e);
	if (r->a & 16) {
		length = sizeof acl;
		memcpy(value, acl, length);
		value[r->e % length] ^= r->e >> 8;
	}
	check(w, x3_setxattr(w->img, pick(w, r->b), name, strlen(name), value, length, r->a & 3));
}

static void get_xattrs(struct world *w, const struct record *r)
{
	static char buffer[66000];
	uint32_t ino = pick(w, r->b);
	const char *name = xattr_name(r->c);

	check(w, x3_listxattr(w->img, ino, buffer, r->d % sizeof buffer));
	check(w, x3_getxattr(w->img, ino, name, strlen(name), buffer, r->e % sizeof buffer));
}

static void set_attr(struct world *w, const struct record *r)
{
	struct x3_attr attr = { .mode = r->c,
				.uid = r->d,
				.gid = r->e,
				.atime_ns = (int64_t)r->d << (r->c & 31),
				.mtime_ns = -((int64_t)r->e << (r->c & 31)) };

	uint32_t ino = pick(w, r->b);

	if (!(r->a & 32))
		check(w, x3_setattr(w->img, ino, r->a & 31, &attr));
	else if (check(w, x3_setattr_simple(w->img, ino, r->a & 31, &attr)) == 0)
		check(w, x3_is_simple(w->img, ino));
}

/* Carry out a record about the data or attributes of one file. */
void file_operation(struct world *w, const struct record *r)
{
	const char *name = xattr_name(r->c);

	switch (what(r)) {
	case WRITE:
		return write_one(w, r);
	case READ:
		return read_one(w, r);
	case TRUNCATE:
		check(w, x3_truncate(w->img, pick(w, r->b), offset_of(w, r->d)));
		return;
	case SEGMENTS:
		return segments(w, r);
	case SCATTER:
		return scatter(w, r);
	case SET_XATTR:
		return set_xattr(w, r);
	case REMOVE_XATTR:
		check(w, x3_removexattr(w->img, pick(w, r->b), name, strlen(name)));
		return;
	case GET_XATTRS:
		return get_xattrs(w, r);
	case SET_ATTR:
		return set_attr(w, r);
	default:
		return;
	}
}
