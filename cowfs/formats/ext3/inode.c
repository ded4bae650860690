/*
 * Inodes: finding them, their attributes, making and deleting them, the orphan list.
 */
#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "internal.h"

int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	return (uint64_t)now.tv_sec * NS + now.tv_nsec;
}


/* --- finding --- */

/* Inode *ino* without any checks. */
struct inode inode_at(x3_image *img, uint32_t ino)
{
	struct inode in = { .ino = ino };
	uint64_t byte;

	if (ino == 0 || ino > img->inodes)
		fail(img, EUCLEAN, "inode %u does not exist", ino);
	byte = (uint64_t)((ino - 1) % img->inodes_per_group) * img->inode_size;
	in.block = block_get(img,
			     group_get(img, (ino - 1) / img->inodes_per_group)->bg_inode_table + (byte >> img->bits));
	in.offset = byte & (img->bs - 1);
	in.raw = (struct ext2_inode_large *)(in.block->data + in.offset);
	return in;
}

/* Inode *ino*, which must be in use and of a supported kind. */
struct inode inode_get(x3_image *img, uint32_t ino)
{
	struct inode in = inode_at(img, ino);
	uint32_t type = in.raw->i_mode >> 12, extra = 0;

	if (ino != EXT2_ROOT_INO && ino < img->first_ino)
		fail(img, EUCLEAN, "inode %u is reserved", ino);
	if (in.raw->i_links_count == 0) { /* a kept orphan, or a free inode */
		const struct block *bitmap = block_get(
			img, group_get(img, (ino - 1) / img->inodes_per_group)->bg_inode_bitmap);
		uint32_t bit = (ino - 1) % img->inodes_per_group;
		if (!(bitmap->data[bit / 8] >> bit % 8 & 1))
			fail(img, ESTALE, "inode %u is free", ino);
	}
	if (img->inode_size > EXT2_GOOD_OLD_INODE_SIZE)
		extra = in.raw->i_extra_isize;
	if (S_ISREG(in.raw->i_mode) && in.raw->i_size_high >> 31) /* 2^63 bytes and more: no off_t */
		fail(img, EUCLEAN, "inode %u has an impossible size", ino);
	if (!((1 << 1 | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 8 | 1 << 10 | 1 << 12) >> type & 1) ||
	    in.raw->i_flags & (EXT4_EXTENTS_FL | EXT4_INLINE_DATA_FL | EXT4_EA_INODE_FL) || extra % 4 ||
	    (extra && extra > img->inode_size - EXT2_GOOD_OLD_INODE_SIZE))
		fail(img, EUCLEAN, "inode %u is invalid", ino);
	return in;
}

/* The same, to be changed. *lasting*: also fields other than its times, which fdatasync(2) must write. */
struct inode inode_change(x3_image *img, uint32_t ino, bool lasting)
{
	struct inode in = inode_get(img, ino);

	block_change(img, in.block, in.offset, img->inode_size);
	img->changed[ino % 4096] = img->tid;
	if (lasting)
		img->lasting[ino % 4096] = img->tid;
	return in;
}


/* --- attributes --- */

uint64_t inode_size_of(const struct inode *in)
{
	return in->raw->i_size | (S_ISREG(in->raw->i_mode) ? (uint64_t)in->raw->i_size_high << 32 : 0);
}

void inode_set_size(x3_image *img, struct inode *in, uint64_t size)
{
	in->raw->i_size = size;
	if (S_ISREG(in->raw->i_mode))
		in->raw->i_size_high = size >> 32;
	if (size > 0x7fffffff)
		super_need(img, 0, EXT2_FEATURE_RO_COMPAT_LARGE_FILE);
	img->lasting[in->ino % 4096] = img->tid;
}

/* Add *count* filesystem blocks to i_blocks. */
void inode_add_blocks(x3_image *img, struct inode *in, int64_t count)
{
	in->raw->i_blocks += count * (img->bs / 512);
	img->lasting[in->ino % 4096] = img->tid;
}

/* Whether i_block[] contains block numbers: not for devices and short symlinks. */
bool inode_is_mapped(x3_image *img, const struct inode *in)
{
	uint32_t type = in->raw->i_mode & S_IFMT;

	if (type == S_IFLNK)
		return in->raw->i_blocks > (in->raw->i_file_acl ? img->bs / 512 : 0);
	return type == S_IFREG || type == S_IFDIR;
}

/* Whether the inode has space for the field that ends at *end*. */
static bool has_extra(x3_image *img, const struct inode *in, size_t end)
{
	return img->inode_size > EXT2_GOOD_OLD_INODE_SIZE &&
	       EXT2_GOOD_OLD_INODE_SIZE + (size_t)in->raw->i_extra_isize >= end;
}

/*
 * Read a time: 32 bits of seconds and, if there is space, two more bits and the nanoseconds. From 2262 on, the result
 * wraps around to values before 1901, which no inode has.
 */
static int64_t time_get(x3_image *img, const struct inode *in, const uint32_t *base, const uint32_t *extra)
{
	int64_t sec = (int32_t)*base;

	if (!has_extra(img, in, (const char *)(extra + 1) - (const char *)in->raw))
		return sec * NS;
	sec += (int64_t)(*extra & 3) << 32;
	return (uint64_t)sec * NS + min(*extra >> 2, (uint32_t)NS - 1);
}

static void time_set(x3_image *img, struct inode *in, uint32_t *base, uint32_t *extra, int64_t ns)
{
	bool wide = has_extra(img, in, (const char *)(extra + 1) - (const char *)in->raw);
	int64_t most = wide ? INT32_MAX + (3LL << 32) : INT32_MAX;
	uint64_t since = (uint64_t)ns - (uint64_t)INT32_MIN * NS; /* since the earliest time */
	int64_t sec = INT32_MIN + (int64_t)(since / NS), nsec = since % NS;

	if (sec == INT32_MIN || sec >= most) { /* as timestamp_truncate() in the kernel's fs/inode.c */
		sec = min(sec, most);
		nsec = 0;
	}
	*base = sec;
	if (wide)
		*extra = nsec << 2 | ((sec - (int32_t)sec) >> 32 & 3);
}

/* Set the times that *what* selects. */
void inode_times(x3_image *img, struct inode *in, uint32_t what, int64_t ns)
{
	if (what & X3_ATIME)
		time_set(img, in, &in->raw->i_atime, &in->raw->i_atime_extra, ns);
	if (what & X3_MTIME)
		time_set(img, in, &in->raw->i_mtime, &in->raw->i_mtime_extra, ns);
	if (what & CTIME)
		time_set(img, in, &in->raw->i_ctime, &in->raw->i_ctime_extra, ns);
}

/* Whether reading changes its atime (atime_needs_update() in the kernel's fs/inode.c). */
bool inode_atime_is_due(x3_image *img, const struct inode *in, int64_t now, bool always)
{
	enum { A_DAY = 24 * 60 * 60 };
	const struct ext2_inode_large *raw = in->raw;
	uint64_t first = (uint64_t)INT32_MIN * NS;
	uint64_t atime = (uint64_t)time_get(img, in, &raw->i_atime, &raw->i_atime_extra) - first;
	uint64_t mtime = (uint64_t)time_get(img, in, &raw->i_mtime, &raw->i_mtime_extra) - first;
	uint64_t ctime = (uint64_t)time_get(img, in, &raw->i_ctime, &raw->i_ctime_extra) - first;
	uint64_t then = (uint64_t)now - first;
	bool wide = has_extra(img, in, (const char *)(&raw->i_atime_extra + 1) - (const char *)raw);

	if (raw->i_flags & EXT2_NOATIME_FL)
		return false;
	if (!always && mtime < atime && ctime < atime && (then < atime || then / NS - atime / NS < A_DAY))
		return false;
	return wide ? atime != then : atime / NS != then / NS;
}

void inode_attr(x3_image *img, const struct inode *in, struct x3_attr *out)
{
	const struct ext2_inode_large *raw = in->raw;

	*out = (struct x3_attr){
		.mode = raw->i_mode,
		.nlink = raw->i_links_count,
		.uid = raw->i_uid | (uint32_t)raw->osd2.linux2.l_i_uid_high << 16,
		.gid = raw->i_gid | (uint32_t)raw->osd2.linux2.l_i_gid_high << 16,
		.generation = raw->i_generation,
		.flags = raw->i_flags,
		.size = inode_size_of(in),
		.blocks = raw->i_blocks,
		.atime_ns = time_get(img, in, &raw->i_atime, &raw->i_atime_extra),
		.mtime_ns = time_get(img, in, &raw->i_mtime, &raw->i_mtime_extra),
		.ctime_ns = time_get(img, in, &raw->i_ctime, &raw->i_ctime_extra),
	};
	if (S_ISCHR(raw->i_mode) || S_ISBLK(raw->i_mode)) {
		uint32_t old = raw->i_block[0], new = raw->i_block[1];
		out->major = old ? old >> 8 & 0xff : (new & 0xfff00) >> 8;
		out->minor = old ? old & 0xff : (new & 0xff) | (new >> 12 & 0xfff00);
	}
}

/* Read the birth time; false: the inode has no space for it. */
bool inode_birth(x3_image *img, const struct inode *in, int64_t *ns)
{
	if (!has_extra(img, in, offsetof(struct ext2_inode_large, i_crtime_extra) + sizeof in->raw->i_crtime_extra))
		return false;
	*ns = time_get(img, in, &in->raw->i_crtime, &in->raw->i_crtime_extra);
	return true;
}


/* --- flags of chattr(1): ext4_fileattr_set() in fs/ext4/ioctl.c --- */

/* FS_DAX_FL and FS_PROJINHERIT_FL, of linux/fs.h, are not in all versions of <ext2fs/ext2_fs.h>. EOFBLOCKS has no
 * meaning any more, but is kept (EXT4_FL_USER_MODIFIABLE). */
enum { EOFBLOCKS = 0x00400000, DAX = 0x02000000, PROJINHERIT = 0x20000000 };

/* Flags that callers may pass: these are set … */
#define FLAGS_KEPT                                                                                          \
	(EXT2_SECRM_FL | EXT2_UNRM_FL | EXT2_COMPR_FL | EXT2_SYNC_FL | EXT2_IMMUTABLE_FL | EXT2_APPEND_FL | \
	 EXT2_NODUMP_FL | EXT2_NOATIME_FL | EXT3_JOURNAL_DATA_FL | EXT2_NOTAIL_FL | EOFBLOCKS | DAX)
#define FLAGS_OF_DIRECTORIES (EXT2_DIRSYNC_FL | EXT2_TOPDIR_FL | PROJINHERIT)
/* … and these are ignored and stay as they are. */
#define FLAGS_SHOWN                                                                                           \
	(EXT2_DIRTY_FL | EXT2_COMPRBLK_FL | EXT2_NOCOMPR_FL | EXT4_ENCRYPT_FL | EXT2_INDEX_FL | 0x00100000u | \
	 0x10000000u)
/* Flags that a new inode inherits from its directory. */
#define FLAGS_INHERITED                                                                                   \
	(EXT2_SECRM_FL | EXT2_UNRM_FL | EXT2_COMPR_FL | EXT2_SYNC_FL | EXT2_NODUMP_FL | EXT2_NOATIME_FL | \
	 EXT3_JOURNAL_DATA_FL | EXT2_NOTAIL_FL | EXT2_DIRSYNC_FL | PROJINHERIT | DAX)

static uint32_t flags_kept(uint32_t mode)
{
	return FLAGS_KEPT | (S_ISDIR(mode) ? FLAGS_OF_DIRECTORIES : 0);
}

/* Set the flags that can be set. EOPNOTSUPP for flags that ext3 does not have; EINVAL for extents. */
void inode_set_flags(x3_image *img, struct inode *in, uint32_t flags)
{
	uint32_t kept = flags_kept(in->raw->i_mode);

	if (flags & EXT4_EXTENTS_FL)
		fail(img, EINVAL, "no extents here");
	if (flags & ~(kept | FLAGS_SHOWN))
		fail(img, EOPNOTSUPP, "no such flag here");
	in->raw->i_flags = (in->raw->i_flags & ~kept) | (flags & kept);
}

static uint32_t flags_inherited(x3_image *img, uint32_t dir, uint32_t mode)
{
	uint32_t flags = inode_get(img, dir).raw->i_flags & FLAGS_INHERITED;

	if (S_ISDIR(mode))
		return flags;
	return flags & (S_ISREG(mode) ? FLAGS_KEPT : EXT2_NODUMP_FL | EXT2_NOATIME_FL);
}


/* --- making --- */

static void make_device(struct ext2_inode_large *raw, uint32_t major, uint32_t minor)
{
	if (major < 256 && minor < 256)
		raw->i_block[0] = major << 8 | minor;
	else
		raw->i_block[1] = (minor & 0xff) | major << 8 | (minor & ~0xffu) << 12;
}

static void make_symlink(x3_image *img, struct inode *in, const char *target, uint32_t len)
{
	if (len == 0)
		fail(img, EINVAL, "an empty target");
	if (len >= min(img->bs, PATH_MAX))
		fail(img, ENAMETOOLONG, "too long a target");
	if (memchr(target, 0, len))
		fail(img, EINVAL, "a NUL in a target");
	if (len < sizeof in->raw->i_block)
		memcpy(in->raw->i_block, target, len);
	else
		memcpy(data_append_meta(img, in, 0)->data, target, len);
	in->raw->i_size = len;
}

/* A new inode in the directory *dir*, with one link (a directory: two). */
struct inode inode_make(x3_image *img, uint32_t dir, const struct x3_new *n)
{
	bool is_dir = S_ISDIR(n->mode);
	uint32_t ino = alloc_inode(img, dir, is_dir), extra = img->extra_isize;
	struct inode in = inode_at(img, ino);
	int64_t now = now_ns();

	in.raw = block_change(img, in.block, in.offset, img->inode_size);
	img->changed[ino % 4096] = img->lasting[ino % 4096] = img->tid;
	memset(in.raw, 0, img->inode_size);
	if (extra)
		in.raw->i_extra_isize = extra;
	in.raw->i_mode = n->mode;
	in.raw->i_uid = n->uid;
	in.raw->osd2.linux2.l_i_uid_high = n->uid >> 16;
	in.raw->i_gid = n->gid;
	in.raw->osd2.linux2.l_i_gid_high = n->gid >> 16;
	in.raw->i_links_count = is_dir ? 2 : 1;
	in.raw->i_flags = flags_inherited(img, dir, n->mode);
	img->random = img->random * 6364136223846793005ull + 1442695040888963407ull;
	in.raw->i_generation = img->random >> 32;
	inode_times(img, &in, X3_ATIME | X3_MTIME | CTIME, now);
	if (extra)
		time_set(img, &in, &in.raw->i_crtime, &in.raw->i_crtime_extra, now);
	switch (n->mode & S_IFMT) {
	case S_IFDIR:
		dir_init(img, &in, dir);
		break;
	case S_IFLNK:
		make_symlink(img, &in, n->target, n->target_len);
		break;
	case S_IFCHR:
	case S_IFBLK:
		make_device(in.raw, n->major, n->minor);
		break;
	case S_IFREG:
	case S_IFIFO:
	case S_IFSOCK:
		break;
	default:
		fail(img, EINVAL, "an unknown type");
	}
	return in;
}


/* --- the orphan list: from s_last_orphan on, each has the next one's number in i_dtime --- */

static void set_last_orphan(x3_image *img, uint32_t ino)
{
	block_change(img, img->sb_block, (char *)&img->sb->s_last_orphan - img->sb_block->data, 4);
	img->sb->s_last_orphan = ino;
}

static void remember_previous(x3_image *img, uint32_t ino, uint32_t previous)
{
	img->orphan_hint[ino % 4096].ino = ino;
	img->orphan_hint[ino % 4096].previous = previous;
}

/* Add an inode to the orphan list. After a crash it is deleted or, if it has a name, truncated to its size. */
void orphan_add(x3_image *img, struct inode *in)
{
	uint32_t next = img->sb->s_last_orphan;

	if (img->debug & X3_NO_ORPHANS)
		return;
	in->raw->i_dtime = next;
	if (next)
		remember_previous(img, next, in->ino);
	set_last_orphan(img, in->ino);
}

/* Remove an inode, which is being changed, from the orphan list. */
void orphan_remove(x3_image *img, struct inode *in)
{
	uint32_t next = in->raw->i_dtime, at = img->sb->s_last_orphan, previous;

	if (img->debug & X3_NO_ORPHANS)
		return;
	in->raw->i_dtime = 0;
	if (at == in->ino) {
		set_last_orphan(img, next);
		return;
	}
	previous = img->orphan_hint[in->ino % 4096].previous;
	if (img->orphan_hint[in->ino % 4096].ino != in->ino || inode_at(img, previous).raw->i_dtime != in->ino) {
		uint32_t steps = img->inodes;
		for (previous = 0; at != in->ino; at = inode_at(img, at).raw->i_dtime) {
			if (!at || !steps--)
				fail(img, EUCLEAN, "inode %u is not on the orphan list", in->ino);
			previous = at;
		}
	}
	inode_change(img, previous, true).raw->i_dtime = next;
	if (next)
		remember_previous(img, next, previous);
}

/* Fail if the orphan list contains an inode that cannot be an orphan, or has no end. Call it before using the list. */
void orphan_check(x3_image *img)
{
	uint32_t ino = img->sb->s_last_orphan, seen = 0;

	for (uint64_t steps = 1, limit = 2; ino; steps++) {
		struct inode in = inode_get(img, ino);
		if (ino == seen || (in.raw->i_links_count && !S_ISREG(in.raw->i_mode)))
			fail(img, EUCLEAN, "the orphan list is damaged at inode %u", ino);
		if (steps == limit) { /* Brent's algorithm: a cycle of any length returns to a saved value */
			seen = ino;
			limit *= 2;
		}
		ino = in.raw->i_dtime;
	}
}


/* --- deleting --- */

/*
 * Free an inode without names, or as many of its blocks as one operation should free. Return whether it is freed; if
 * not, op->rest is the number of blocks left.
 *
 * *listed*: it is on the orphan list.
 */
bool inode_delete_some(x3_image *img, uint32_t ino, bool listed)
{
	struct inode in = inode_change(img, ino, true);

	if (inode_is_mapped(img, &in) && !data_free_from(img, &in, 0)) {
		img->op->rest = in.raw->i_blocks / (img->bs / 512);
		return false;
	}
	xattr_free_block(img, &in);
	if (listed)
		orphan_remove(img, &in);
	in.raw->i_size = in.raw->i_size_high = 0;
	in.raw->i_blocks = 0;
	in.raw->i_dtime = now_ns() / NS;
	free_inode(img, ino, S_ISDIR(in.raw->i_mode));
	return true;
}

/*
 * Decrease the link count for a removed name. After the last name (a directory has only one), free the inode unless
 * *keep*.
 */
enum fate inode_drop_link(x3_image *img, uint32_t ino, bool keep)
{
	struct inode in = inode_change(img, ino, true);

	if (in.raw->i_links_count == 0)
		fail(img, EUCLEAN, "inode %u has a name, but no links", ino);
	in.raw->i_links_count = S_ISDIR(in.raw->i_mode) ? 0 : in.raw->i_links_count - 1;
	inode_times(img, &in, CTIME, now_ns());
	if (in.raw->i_links_count || (!keep && inode_delete_some(img, ino, false)))
		return LIVES;
	orphan_add(img, &in);
	return keep ? IS_KEPT : HAS_REST;
}
