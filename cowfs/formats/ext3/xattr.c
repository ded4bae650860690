/*
 * Extended attributes: first behind the inode's fields, then in one block of their own (fs/ext3/xattr.c).
 *
 * Both have entries from the front and values from the end. The block's entries are sorted and hashed. Several inodes
 * may share identical blocks (h_refcount): such a block is copied before it is changed. To make a change, all
 * attributes are read, and both places are written again.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

typedef struct ext2_ext_attr_entry xentry;
typedef struct ext2_ext_attr_header xheader;

struct attr {
	uint8_t index, name_len; /* the namespace, and the rest of the name */
	const char *name, *value;
	uint32_t size;
};

#define ATTRS_MAX 512

/* All attributes of an inode, those in the inode itself first. They point to the bytes in their places. */
struct attrs {
	struct attr attr[ATTRS_MAX];
	uint32_t n;
};

/* Copies of the two places. */
struct places {
	char inode[BLOCK_MAX], block[BLOCK_MAX];
};

enum { USER = 1, ACL_ACCESS = 2, ACL_DEFAULT = 3, TRUSTED = 4, SECURITY = 6 };
static const struct {
	uint8_t index;
	const char *prefix;
	bool whole; /* the prefix is the whole name */
} spaces[] = {
	{ ACL_ACCESS, "system.posix_acl_access", true },
	{ ACL_DEFAULT, "system.posix_acl_default", true },
	{ USER, "user.", false },
	{ TRUSTED, "trusted.", false },
	{ SECURITY, "security.", false },
};
#define SPACES (sizeof spaces / sizeof *spaces)

static bool is_acl(uint8_t index)
{
	return index == ACL_ACCESS || index == ACL_DEFAULT;
}

/* Split a full name. */
static struct attr parse_name(x3_image *img, const char *name, uint32_t len)
{
	if (len > 255)
		fail(img, ERANGE, "too long a name");
	for (size_t i = 0; i < SPACES; i++) {
		uint32_t n = strlen(spaces[i].prefix);
		if (len < n || memcmp(name, spaces[i].prefix, n) != 0 || (spaces[i].whole && len > n))
			continue;
		if (len == n && !spaces[i].whole)
			fail(img, EINVAL, "nothing behind the namespace");
		return (struct attr){ .index = spaces[i].index, .name = name + n, .name_len = len - n };
	}
	fail(img, EOPNOTSUPP, "an unknown namespace");
}

static bool same_name(const struct attr *a, const struct attr *b)
{
	return a->index == b->index && a->name_len == b->name_len && memcmp(a->name, b->name, a->name_len) == 0;
}


/* --- reading --- */

/* Read the entries at *start*; their values' offsets count from *base*, and nothing extends beyond *end*. */
static void parse(x3_image *img, struct attrs *all, uint32_t ino, const char *base, const char *start, const char *end)
{
	const char *p = start;

	for (;;) {
		const xentry *e = (const xentry *)p;
		bool good = p + 4 <= end;
		if (good && EXT2_EXT_IS_LAST_ENTRY(e))
			return;
		good = good && p + sizeof *e <= end && p + EXT2_EXT_ATTR_LEN(e->e_name_len) + 4 <= end &&
		       !e->e_value_inum && e->e_value_size <= end - base &&
		       e->e_value_offs <= end - base - e->e_value_size && all->n < ATTRS_MAX;
		if (!good)
			fail(img, EUCLEAN, "the extended attributes of inode %u are damaged", ino);
		all->attr[all->n++] = (struct attr){ e->e_name_index, e->e_name_len, p + sizeof *e,
						     base + e->e_value_offs, e->e_value_size };
		p += EXT2_EXT_ATTR_LEN(e->e_name_len);
	}
}

/* The offset of the attributes in the inode, behind their magic number; 0: no space for any. */
static uint32_t inline_start(x3_image *img, const struct inode *in)
{
	uint32_t start = EXT2_GOOD_OLD_INODE_SIZE + sizeof(uint32_t);

	if (img->inode_size == EXT2_GOOD_OLD_INODE_SIZE || !in->raw->i_extra_isize)
		return 0;
	start += in->raw->i_extra_isize;
	return start + 4 <= img->inode_size ? start : 0;
}

static struct block *xattr_block(x3_image *img, const struct inode *in)
{
	struct block *b;
	const xheader *h;

	check_block(img, in->raw->i_file_acl, 1);
	b = block_get(img, in->raw->i_file_acl);
	h = (const xheader *)b->data;
	if (h->h_magic != EXT2_EXT_ATTR_MAGIC || h->h_blocks != 1 || h->h_refcount == 0)
		fail(img, EUCLEAN, "the attribute block of inode %u is damaged", in->ino);
	return b;
}

/* Find all attributes; read them into *copies*, if there are any. */
static void load(x3_image *img, const struct inode *in, struct attrs *all, struct places *copies)
{
	uint32_t start = inline_start(img, in), magic;
	const char *inode = (const char *)in->raw, *block;

	all->n = 0;
	if (start) {
		memcpy(&magic, inode + start - 4, 4);
		if (copies)
			inode = memcpy(copies->inode, inode, img->inode_size);
		if (magic == EXT2_EXT_ATTR_MAGIC)
			parse(img, all, in->ino, inode + start, inode + start, inode + img->inode_size);
	}
	if (in->raw->i_file_acl) {
		block = xattr_block(img, in)->data;
		if (copies)
			block = memcpy(copies->block, block, img->bs);
		parse(img, all, in->ino, block, block + sizeof(xheader), block + img->bs);
	}
}

bool xattr_any(x3_image *img, const struct inode *in)
{
	struct attrs all;

	if (!in->raw->i_file_acl && !inline_start(img, in))
		return false;
	load(img, in, &all, NULL);
	return all.n > 0;
}

bool xattr_rules(x3_image *img, const struct inode *in)
{
	struct attrs all;

	if (!in->raw->i_file_acl && !inline_start(img, in))
		return false;
	load(img, in, &all, NULL);
	for (uint32_t i = 0; i < all.n; i++)
		if (all.attr[i].index != USER && all.attr[i].index != TRUSTED)
			return true;
	return false;
}

/* The index of an attribute, or -1. */
static int64_t find(const struct attrs *all, const struct attr *wanted)
{
	for (uint32_t i = 0; i < all->n; i++)
		if (same_name(&all->attr[i], wanted))
			return i;
	return -1;
}


/* --- access control lists: shorter on disk than in system calls (linux/posix_acl_xattr.h) --- */

struct acl_long { /* on disk, entries that need no id have none */
	uint16_t tag, perm;
	uint32_t id;
};
enum { ACL_USER = 2, ACL_GROUP = 8 };
enum { ACL_DISK_VERSION = 1, ACL_CALL_VERSION = 2 };

static bool acl_has_id(uint16_t tag)
{
	return tag == ACL_USER || tag == ACL_GROUP;
}

/* Translate an ACL and return its new length, or -1; *out* has room for twice its length. */
static int64_t acl_translate(const char *in, uint64_t size, bool to_disk, char *out)
{
	uint32_t version = to_disk ? ACL_CALL_VERSION : ACL_DISK_VERSION, other = 3 - version;
	char *p = out + 4;

	if (size < 4 || memcmp(in, &version, 4) != 0)
		return -1;
	memcpy(out, &other, 4);
	for (uint64_t at = 4; at < size;) {
		struct acl_long e = { .id = -1 };
		if (size - at < 4)
			return -1;
		memcpy(&e, in + at, 4);
		uint32_t length = to_disk || acl_has_id(e.tag) ? 8 : 4;
		if (size - at < length || !(e.tag && e.tag <= 0x20 && !(e.tag & (e.tag - 1))) || e.perm & ~7)
			return -1;
		memcpy(&e, in + at, length);
		at += length;
		length = !to_disk || acl_has_id(e.tag) ? 8 : 4;
		memcpy(p, &e, length);
		p += length;
	}
	return p - out;
}


/* --- the calls that read --- */

int64_t xattr_list(x3_image *img, uint32_t ino, char *buf, uint64_t cap)
{
	struct inode in = inode_get(img, ino);
	struct attrs all;
	uint64_t used = 0;

	load(img, &in, &all, NULL);
	for (uint32_t i = 0; i < all.n; i++) {
		const struct attr *a = &all.attr[i];
		for (size_t s = 0; s < SPACES; s++) {
			uint32_t n = strlen(spaces[s].prefix), len = n + (spaces[s].whole ? 0 : a->name_len) + 1;
			if (spaces[s].index != a->index || memchr(a->name, 0, a->name_len) ||
			    (!spaces[s].whole && !a->name_len)) /* not a valid name */
				continue;
			if (cap && used + len > cap)
				fail(img, ERANGE, "too small a buffer");
			if (cap) {
				memcpy(buf + used, spaces[s].prefix, n);
				memcpy(buf + used + n, a->name, len - 1 - n);
				buf[used + len - 1] = 0;
			}
			used += len;
		}
	}
	return used;
}

int64_t xattr_get(x3_image *img, uint32_t ino, const char *name, uint32_t len, char *buf, uint64_t cap)
{
	struct inode in = inode_get(img, ino);
	struct attr wanted = parse_name(img, name, len);
	struct attrs all;
	char acl[2 * BLOCK_MAX];
	int64_t i, size;
	const char *value;

	load(img, &in, &all, NULL);
	i = find(&all, &wanted);
	if (i < 0)
		fail(img, ENODATA, "no such attribute");
	value = all.attr[i].value;
	size = all.attr[i].size;
	if (is_acl(wanted.index)) {
		size = acl_translate(value, size, false, acl);
		value = acl;
		if (size < 0)
			fail(img, EUCLEAN, "the ACL of inode %u is damaged", ino);
	}
	if (cap && (uint64_t)size > cap)
		fail(img, ERANGE, "too small a buffer");
	if (cap)
		memcpy(buf, value, size);
	return size;
}


/* --- changing --- */

/* The space that an attribute takes: its entry and its value. */
static uint32_t space(const struct attr *a)
{
	return EXT2_EXT_ATTR_LEN(a->name_len) + EXT2_EXT_ATTR_SIZE(a->size);
}

static uint32_t hash_entry(const xentry *e, const char *value)
{
	const char *name = EXT2_EXT_ATTR_NAME(e);
	uint32_t hash = 0, word;

	for (uint32_t i = 0; i < e->e_name_len; i++)
		hash = hash << 5 ^ hash >> 27 ^ (uint32_t)name[i];
	for (uint32_t i = 0; i < EXT2_EXT_ATTR_SIZE(e->e_value_size); i += 4) {
		memcpy(&word, value + i, 4);
		hash = hash << 16 ^ hash >> 16 ^ word;
	}
	return hash;
}

/* Write attributes into a zeroed area, as parse() reads them; with hashes, return their combined hash. */
static uint32_t build(struct attr *const *attr, uint32_t n, char *base, char *start, char *end, bool hashed)
{
	uint32_t hash = 0;
	bool none = false;

	for (uint32_t i = 0; i < n; i++) {
		const struct attr *a = attr[i];
		xentry *e = (xentry *)start;
		end -= EXT2_EXT_ATTR_SIZE(a->size);
		*e = (xentry){ .e_name_len = a->name_len,
			       .e_name_index = a->index,
			       .e_value_offs = a->size ? end - base : 0,
			       .e_value_size = a->size };
		memcpy(EXT2_EXT_ATTR_NAME(e), a->name, a->name_len);
		memcpy(end, a->value, a->size);
		if (hashed)
			e->e_hash = hash_entry(e, end);
		none |= !e->e_hash;
		hash = hash << 16 ^ hash >> 16 ^ e->e_hash;
		start += EXT2_EXT_ATTR_LEN(a->name_len);
	}
	return none ? 0 : hash;
}

/* The order of the entries in a block. */
static int by_name(const void *x, const void *y)
{
	const struct attr *a = *(struct attr *const *)x, *b = *(struct attr *const *)y;

	if (a->index != b->index)
		return a->index - b->index;
	if (a->name_len != b->name_len)
		return a->name_len - b->name_len;
	return memcmp(a->name, b->name, a->name_len);
}

/* The inode, which is being changed, no longer needs its attribute block. */
void xattr_free_block(x3_image *img, struct inode *in)
{
	struct block *b;

	if (!in->raw->i_file_acl)
		return;
	b = xattr_block(img, in);
	if (((xheader *)b->data)->h_refcount > 1) {
		block_change(img, b, offsetof(xheader, h_refcount), 4);
		((xheader *)b->data)->h_refcount--;
	} else {
		free_blocks(img, in->raw->i_file_acl, 1);
	}
	in->raw->i_file_acl = 0;
	inode_add_blocks(img, in, -1);
}

/* Write the attribute block: in place, unless other inodes share it. */
static void store_block(x3_image *img, struct inode *in, struct attr **attr, uint32_t n)
{
	char data[BLOCK_MAX];
	xheader *h = (xheader *)data;
	struct block *b = NULL;

	memset(data, 0, img->bs);
	qsort(attr, n, sizeof *attr, by_name);
	*h = (xheader){ .h_magic = EXT2_EXT_ATTR_MAGIC, .h_refcount = 1, .h_blocks = 1 };
	h->h_hash = build(attr, n, data, data + sizeof *h, data + img->bs, true);
	if (in->raw->i_file_acl) {
		b = xattr_block(img, in);
		if (((xheader *)b->data)->h_refcount > 1) {
			xattr_free_block(img, in);
			b = NULL;
		}
	}
	if (!b) {
		in->raw->i_file_acl = alloc_block(img, inode_goal(img, in->ino));
		inode_add_blocks(img, in, 1);
		b = block_fresh(img, in->raw->i_file_acl);
	}
	if (memcmp(b->data, data, img->bs) != 0)
		memcpy(block_change(img, b, 0, img->bs), data, img->bs);
}

/* Distribute the attributes between the inode, which is being changed, and its block. ENOSPC. */
static void store(x3_image *img, struct inode *in, struct attrs *all)
{
	struct attr *inner[ATTRS_MAX], *outer[ATTRS_MAX];
	uint32_t start = inline_start(img, in), ninner = 0, nouter = 0;
	uint32_t inner_room = start ? img->inode_size - start - 4 : 0, outer_room = img->bs - sizeof(xheader) - 4;
	char *raw = (char *)in->raw;

	for (uint32_t i = 0; i < all->n; i++) {
		struct attr *a = &all->attr[i];
		uint32_t n = space(a);
		if (n <= inner_room) {
			inner[ninner++] = a;
			inner_room -= n;
		} else if (n <= outer_room) {
			outer[nouter++] = a;
			outer_room -= n;
		} else {
			fail(img, ENOSPC, "the attributes do not fit");
		}
	}
	if (all->n)
		super_need(img, EXT2_FEATURE_COMPAT_EXT_ATTR, 0);
	if (start) {
		memset(raw + start - 4, 0, img->inode_size - start + 4);
		if (ninner)
			memcpy(raw + start - 4, &(uint32_t){ EXT2_EXT_ATTR_MAGIC }, 4);
		build(inner, ninner, raw + start, raw + start, raw + img->inode_size, false);
	}
	if (nouter)
		store_block(img, in, outer, nouter);
	else
		xattr_free_block(img, in);
}

/* See x3_setxattr and x3_removexattr. */
void xattr_set(x3_image *img, uint32_t ino, const char *name, uint32_t len, const char *value, uint64_t size, int flags,
	       bool remove)
{
	struct inode in = inode_change(img, ino, true);
	struct attr new = parse_name(img, name, len);
	struct attrs all;
	struct places copies;
	char acl[2 * BLOCK_MAX];
	int64_t i, length;

	if (img->extra_isize && !in.raw->i_extra_isize) { /* made by an older system: the space is unused */
		memset((char *)in.raw + EXT2_GOOD_OLD_INODE_SIZE, 0, img->inode_size - EXT2_GOOD_OLD_INODE_SIZE);
		in.raw->i_extra_isize = img->extra_isize;
	}
	load(img, &in, &all, &copies);
	i = find(&all, &new);
	if (i >= 0 && flags & 1)
		fail(img, EEXIST, "the attribute is there");
	if (i < 0 && (flags & 2 || remove))
		fail(img, ENODATA, "no such attribute");
	if (size > img->bs)
		fail(img, ENOSPC, "too large a value");
	new.value = value;
	new.size = size;
	if (is_acl(new.index) && !remove) {
		length = acl_translate(value, size, true, acl);
		if (length < 0)
			fail(img, EINVAL, "no valid ACL");
		new.value = acl;
		new.size = length;
	}
	if (!remove && i >= 0 && all.attr[i].size == new.size && !memcmp(all.attr[i].value, new.value, new.size))
		return; /* unchanged, and so is the ctime: ext4_xattr_set_handle() */
	if (remove)
		memmove(&all.attr[i], &all.attr[i + 1], (--all.n - i) * sizeof *all.attr);
	else if (i >= 0)
		all.attr[i] = new;
	else if (all.n == ATTRS_MAX)
		fail(img, ENOSPC, "too many attributes");
	else
		all.attr[all.n++] = new;
	store(img, &in, &all);
	inode_times(img, &in, CTIME, now_ns());
}
