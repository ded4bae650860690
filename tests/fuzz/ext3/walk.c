/*
 * Reads everything in an image, and checks each result of the engine.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "fuzz.h"

#define LISTING (256u << 10) /* four blocks of 64 KiB */
#define DIRECTORIES_MAX 128
#define NAMES_MAX 400u /* names read in one directory */

/* Whether a call may return this error, given the state of the image. */
static bool may_be(const struct world *w, int error)
{
	switch (error) {
	case ENOSPC:
	case ENODATA:
	case ENOENT:
	case EEXIST:
	case ENOTDIR:
	case EISDIR:
	case ENOTEMPTY:
	case EMLINK:
	case EFBIG:
	case EPERM:
	case ENXIO:
	case ERANGE:
	case ENAMETOOLONG:
	case ESTALE:
	case EINVAL:
	case EOPNOTSUPP:
	case EBUSY:
		return true;
	case EIO:
	case EUCLEAN:
	case EBADMSG:
	case EDQUOT:
		return w->damaged || w->injected;
	case EROFS:
		return w->damaged || w->injected || w->read_only;
	}
	return false;
}

/* Report a bug and abort, which libFuzzer notices. */
void finding(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputc('\n', stderr);
	abort();
}

/* Return the result of a call if it is valid; otherwise report a bug. */
int64_t check(struct world *w, int64_t result)
{
	if (result < 0) {
		const char *message = x3_message(w->img);
		if (!may_be(w, -result))
			finding("the engine says %s: %s", strerror(-result), message);
	}
	return result;
}

bool attributes(struct world *w, uint32_t ino, struct x3_attr *attr)
{
	return check(w, x3_getattr(w->img, ino, attr)) >= 0;
}

bool is_directory(struct world *w, uint32_t ino)
{
	struct x3_attr attr;

	return attributes(w, ino, &attr) && S_ISDIR(attr.mode);
}

void know(struct world *w, uint32_t ino)
{
	if (w->nknown < KNOWN_MAX)
		w->known[w->nknown++] = ino;
	else
		w->known[1 + ino % (KNOWN_MAX - 1)] = ino;
}


/* --- directories --- */

/* The next name in the result of x3_readdir. */
static const unsigned char *next_name(const unsigned char *p, struct name *name)
{
	uint16_t offset;

	memcpy(&name->ino, p, 4);
	memcpy(&name->place.block, p + 4, 4);
	memcpy(&offset, p + 8, 2);
	name->place.offset = offset;
	name->type = p[10];
	name->length = p[11];
	memcpy(name->name, p + 12, name->length);
	return p + 12 + name->length;
}

/* Check that a program could have created this name. */
static void check_name(const struct name *name)
{
	bool dots = name->name[0] == '.' && (name->length == 1 || (name->length == 2 && name->name[1] == '.'));

	if (!name->length || dots || memchr(name->name, '/', name->length) || memchr(name->name, 0, name->length))
		finding("the engine gives a name that is none: %.*s", name->length, name->name);
}

/* Read the first names of a directory; return how many. */
uint32_t list(struct world *w, uint32_t dir, struct name *names, uint32_t most)
{
	static unsigned char buffer[LISTING];
	uint64_t cursor = 0;
	uint32_t n = 0;
	int64_t size;

	while (n < most && (size = check(w, x3_readdir(w->img, dir, &cursor, buffer, LISTING))) > 0)
		for (const unsigned char *p = buffer; p < buffer + size && n < most;) {
			p = next_name(p, &names[n]);
			check_name(&names[n++]);
		}
	return n;
}

/* Find a name by reading the whole directory. */
static bool search(struct world *w, uint32_t dir, const char *name, uint32_t length, struct name *found)
{
	static unsigned char buffer[LISTING];
	uint64_t cursor = 0;
	int64_t size;

	while ((size = check(w, x3_readdir(w->img, dir, &cursor, buffer, LISTING))) > 0)
		for (const unsigned char *p = buffer; p < buffer + size;) {
			p = next_name(p, found);
			if (found->length == length && !memcmp(found->name, name, length))
				return true;
		}
	return false;
}

bool find(struct world *w, uint32_t dir, const char *name, uint32_t length, struct name *found)
{
	struct x3_found by_index;
	bool is_there = search(w, dir, name, length, found);
	int64_t said = check(w, x3_lookup(w->img, dir, name, length, &by_index));

	if (w->damaged || w->injected)
		return is_there;
	if (said != is_there || (is_there && (by_index.ino != found->ino || by_index.type != found->type ||
					      memcmp(&by_index.place, &found->place, sizeof by_index.place))))
		finding("a name in directory %u is not found as it is listed", dir);
	return is_there;
}


/* --- everything --- */

struct digest {
	uint64_t value;
};

static void add(struct digest *d, const void *data, size_t length)
{
	const unsigned char *p = data;
	uint64_t word;

	for (; length >= 8; p += 8, length -= 8) {
		memcpy(&word, p, 8);
		d->value = (d->value ^ word) * 0x9e3779b97f4a7c15u;
		d->value ^= d->value >> 29;
	}
	for (; length; p++, length--)
		d->value = (d->value ^ *p) * 0x100000001b3u;
}

static void add_xattrs(struct world *w, uint32_t ino, struct digest *d)
{
	static char names[65536], value[65536];
	int64_t size = check(w, x3_listxattr(w->img, ino, names, sizeof names)), n;

	for (int64_t at = 0; at < size; at += strlen(names + at) + 1) {
		uint32_t length = strlen(names + at);
		n = check(w, x3_getxattr(w->img, ino, names + at, length, value, sizeof value));
		add(d, names + at, length);
		add(d, value, n > 0 ? n : 0);
	}
}

/* Add the data of a file to the digest, up to a limit. */
static void add_data(struct world *w, uint32_t ino, struct digest *d)
{
	static char buffer[128 << 10];
	uint64_t from = 0, stop = 0;
	int64_t start;

	for (int pieces = 0; pieces < 64; pieces++, from = stop) {
		start = check(w, x3_segment(w->img, ino, from, &stop));
		if (start < 0)
			break;
		if ((uint64_t)start < from || stop <= (uint64_t)start)
			finding("no segment: %lld to %lld", (long long)start, (long long)stop);
		uint64_t length = stop - start < sizeof buffer ? stop - start : sizeof buffer;
		int64_t n = check(w, x3_read(w->img, ino, buffer, length, start));
		add(d, &start, sizeof start);
		add(d, buffer, n > 0 ? n : 0);
	}
	check(w, x3_read(w->img, ino, buffer, 1000, from));
}

static void add_inode(struct world *w, uint32_t ino, const struct x3_attr *attr, struct digest *d)
{
	static char target[4096];
	int64_t n;

	add(d, &ino, sizeof ino);
	add(d, attr, sizeof *attr);
	add_xattrs(w, ino, d);
	if (S_ISLNK(attr->mode)) {
		n = check(w, x3_readlink(w->img, ino, target, sizeof target));
		add(d, target, n > 0 ? n : 0);
	}
	if (S_ISREG(attr->mode))
		add_data(w, ino, d);
	if (S_ISDIR(attr->mode))
		check(w, x3_parent(w->img, ino));
}

static bool was_seen(const uint32_t *seen, uint32_t n, uint32_t ino)
{
	while (n--)
		if (seen[n] == ino)
			return true;
	return false;
}

/* Read up to *most* names of the tree; return a digest, which is equal for equal trees. */
uint64_t walk(struct world *w, uint32_t most)
{
	static struct name names[NAMES_MAX];
	uint32_t pending[DIRECTORIES_MAX] = { 2 }, npending = 1, done = 0;
	struct digest d = { 0 };
	struct x3_attr attr;
	struct x3_facts facts;

	check(w, x3_facts(w->img, &facts));
	while (done < npending && most) {
		uint32_t dir = pending[done++], n = list(w, dir, names, NAMES_MAX < most ? NAMES_MAX : most);
		most -= n;
		for (uint32_t i = 0; i < n; i++) {
			memset(&attr, 0, sizeof attr);
			if (check(w, x3_child(w->img, dir, names[i].ino, &attr)) < 0)
				continue;
			add(&d, names[i].name, names[i].length);
			add_inode(w, names[i].ino, &attr, &d);
			if (S_ISDIR(attr.mode) && npending < DIRECTORIES_MAX &&
			    !was_seen(pending, npending, names[i].ino))
				pending[npending++] = names[i].ino;
		}
	}
	return d.value;
}
