/*
 * Directories: blocks full of entries (struct ext2_dir_entry_2), each as long as its rec_len says.
 */
#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "internal.h"

/* The type of a directory entry, by the file type of the mode. */
static uint8_t entry_type(const x3_image *img, uint32_t mode)
{
	static const uint8_t type[16] = {
		[S_IFREG >> 12] = EXT2_FT_REG_FILE, [S_IFDIR >> 12] = EXT2_FT_DIR,  [S_IFCHR >> 12] = EXT2_FT_CHRDEV,
		[S_IFBLK >> 12] = EXT2_FT_BLKDEV,   [S_IFIFO >> 12] = EXT2_FT_FIFO, [S_IFSOCK >> 12] = EXT2_FT_SOCK,
		[S_IFLNK >> 12] = EXT2_FT_SYMLINK,
	};

	return img->filetype ? type[mode >> 12 & 15] : 0;
}

static struct inode get_dir(x3_image *img, uint32_t ino)
{
	struct inode in = inode_get(img, ino);

	if (!S_ISDIR(in.raw->i_mode))
		fail(img, ENOTDIR, "not a directory");
	return in;
}

/* The same, to be changed; sets its mtime and ctime to now. */
static struct inode change_dir(x3_image *img, uint32_t ino)
{
	struct inode in = inode_change(img, ino, true);

	if (!S_ISDIR(in.raw->i_mode))
		fail(img, ENOTDIR, "not a directory");
	inode_times(img, &in, X3_MTIME | CTIME, now_ns());
	return in;
}

uint64_t dir_blocks(x3_image *img, const struct inode *dir)
{
	if (dir->raw->i_size & (img->bs - 1) || dir->raw->i_size > INT32_MAX)
		fail(img, EUCLEAN, "directory %u is of an impossible length", dir->ino);
	return dir->raw->i_size >> img->bits;
}

struct block *dir_block(x3_image *img, const struct inode *dir, uint64_t at)
{
	uint32_t nr = data_map(img, dir, at, 1).nr;

	if (!nr)
		fail(img, EUCLEAN, "directory %u has a hole", dir->ino);
	return block_get(img, nr);
}

/* The length of an entry on disk, where 16 bits are too few for blocks of 64 KiB (ext4_rec_len_from_disk). */
uint32_t entry_length(const x3_image *img, const entry *e)
{
	if (img->bs < 65536)
		return e->rec_len;
	if (e->rec_len == 65535 || e->rec_len == 0)
		return 65536;
	return (e->rec_len & ~3u) | (e->rec_len & 3u) << 16;
}

void entry_set_length(const x3_image *img, entry *e, uint32_t length)
{
	e->rec_len = length == 65536 && img->bs == 65536 ? 65535 : length;
}

/* The entry at *offset*, if it is valid. */
entry *dir_entry(x3_image *img, struct block *b, uint32_t offset)
{
	entry *e = (entry *)(b->data + offset);
	uint32_t length = offset + 12 <= img->bs ? entry_length(img, e) : 0;

	if (offset % 4 || length < 12 || length % 4 || offset + length > img->bs || RECORD(e->name_len) > length ||
	    e->inode > img->inodes || (e->inode && !e->name_len))
		fail(img, EUCLEAN, "directory block %u is damaged at offset %u", b->nr, offset);
	return e;
}

static bool is_dots(const entry *e)
{
	return e->name[0] == '.' && (e->name_len == 1 || (e->name_len == 2 && e->name[1] == '.'));
}


/* --- adding --- */

/* Put a name into a block that has room; return its offset, or -1. */
int64_t dir_put(x3_image *img, struct block *b, const char *name, uint32_t len, uint32_t ino, uint8_t type)
{
	for (uint32_t offset = 0; offset < img->bs;) {
		entry *e = dir_entry(img, b, offset);
		uint32_t used = e->inode ? RECORD(e->name_len) : 0, room = entry_length(img, e);
		if (room < used + RECORD(len)) {
			offset += room;
			continue;
		}
		block_change(img, b, offset, used + RECORD(len));
		if (used) {
			entry_set_length(img, e, used);
			offset += used;
			e = (entry *)(b->data + offset);
		}
		e->inode = ino;
		entry_set_length(img, e, room - used);
		e->name_len = len;
		e->file_type = type;
		memcpy(e->name, name, len);
		return offset;
	}
	return -1;
}

/* Add an empty block to a directory, which is being changed; *at* is its logical number. */
struct block *dir_append(x3_image *img, struct inode *dir, uint32_t *at)
{
	struct block *b;

	*at = dir_blocks(img, dir);
	if ((uint64_t)dir->raw->i_size + img->bs > INT32_MAX)
		fail(img, ENOSPC, "too large a directory");
	b = data_append_meta(img, dir, *at);
	entry_set_length(img, (entry *)b->data, img->bs);
	inode_set_size(img, dir, (uint64_t)dir->raw->i_size + img->bs);
	return b;
}

/* Add a name to a directory; for *hint* see x3_create. */
struct x3_place dir_insert(x3_image *img, uint32_t ino, const char *name, uint32_t len, uint32_t target, uint32_t mode,
			   uint32_t hint)
{
	struct inode dir = change_dir(img, ino);
	uint64_t blocks = dir_blocks(img, &dir);
	uint8_t type = entry_type(img, mode);
	uint32_t at;
	int64_t offset;

	if (len == 0 || len > EXT2_NAME_LEN)
		fail(img, len ? ENAMETOOLONG : EINVAL, "a bad name");
	if (dir.raw->i_links_count == 0)
		fail(img, ENOENT, "the directory is removed");
	if (blocks == 0)
		fail(img, EUCLEAN, "directory %u is empty", ino);
	if (htree_usable(img, &dir))
		return htree_insert(img, &dir, name, len, target, type);
	dir.raw->i_flags &= ~EXT2_INDEX_FL;
	for (at = min(hint, blocks - 1); at < blocks; at++) {
		offset = dir_put(img, dir_block(img, &dir, at), name, len, target, type);
		if (offset >= 0)
			return (struct x3_place){ at, offset };
	}
	if (blocks == 1 && htree_make(img, &dir))
		return htree_insert(img, &dir, name, len, target, type);
	offset = dir_put(img, dir_append(img, &dir, &at), name, len, target, type);
	return (struct x3_place){ at, offset };
}

/* The first block of a new directory. */
void dir_init(x3_image *img, struct inode *dir, uint32_t parent)
{
	uint32_t at;
	struct block *b = dir_append(img, dir, &at);
	uint8_t type = entry_type(img, S_IFDIR);

	dir_put(img, b, ".", 1, dir->ino, type);
	dir_put(img, b, "..", 2, parent, type);
}


/* --- finding, removing, replacing --- */

static bool is_it(const entry *e, const char *name, uint32_t len, uint32_t ino)
{
	return (ino == ANY_INO ? e->inode != 0 : e->inode == ino) && e->name_len == len &&
	       memcmp(e->name, name, len) == 0;
}

/* Where a block has a name of *ino*, which may be ANY_INO; false if it has none. */
bool dir_find_in(x3_image *img, const struct inode *dir, uint32_t at, const char *name, uint32_t len, uint32_t ino,
		 struct x3_place *where)
{
	struct block *b = dir_block(img, dir, at);

	for (uint32_t offset = 0; offset < img->bs;) {
		entry *e = dir_entry(img, b, offset);
		if (is_it(e, name, len, ino)) {
			*where = (struct x3_place){ at, offset };
			return true;
		}
		offset += entry_length(img, e);
	}
	return false;
}

/*
 * Find a name of *ino*: in the block of *guess*, where the index says, or anywhere. ENOENT.
 *
 * The block is walked in any case: an old offset may point into the middle of an entry.
 */
struct x3_place dir_find(x3_image *img, const struct inode *dir, const char *name, uint32_t len, struct x3_place guess,
			 uint32_t ino)
{
	uint64_t blocks = dir_blocks(img, dir);
	struct x3_place where;

	if (guess.block < blocks && dir_find_in(img, dir, guess.block, name, len, ino, &where))
		return where;
	if (htree_usable(img, dir) && dir_find_in(img, dir, htree_find(img, dir, name, len), name, len, ino, &where))
		return where;
	for (uint64_t at = 0; at < blocks; at++)
		if (dir_find_in(img, dir, at, name, len, ino, &where))
			return where;
	fail(img, ENOENT, "no such name");
}

#define SCAN_MAX (64u << 20) /* bytes of a directory without an index that are searched: others wait */

/* See x3_lookup. */
bool dir_lookup(x3_image *img, uint32_t ino, const char *name, uint32_t len, struct x3_found *out)
{
	struct inode dir = get_dir(img, ino);
	uint64_t blocks = dir_blocks(img, &dir);
	bool found = false;
	entry *e;

	if (!len || len > EXT2_NAME_LEN || (name[0] == '.' && (len == 1 || (len == 2 && name[1] == '.'))))
		return false;
	if (htree_usable(img, &dir)) {
		found = htree_lookup(img, &dir, name, len, &out->place);
	} else {
		if (blocks << img->bits > SCAN_MAX)
			fail(img, EFBIG, "too large a directory without an index");
		for (uint64_t at = 0; at < blocks && !found; at++)
			found = dir_find_in(img, &dir, at, name, len, ANY_INO, &out->place);
	}
	if (!found)
		return false;
	e = dir_entry(img, dir_block(img, &dir, out->place.block), out->place.offset);
	out->ino = e->inode;
	out->type = e->file_type;
	return true;
}

/* Remove the name at *where*. */
void dir_remove(x3_image *img, uint32_t ino, struct x3_place where)
{
	struct inode dir = change_dir(img, ino);
	struct block *b = dir_block(img, &dir, where.block);
	uint32_t previous = 0, next;
	entry *e;

	if (where.offset == 0) {
		*(uint32_t *)block_change(img, b, 0, 4) = 0;
		return;
	}
	while ((next = previous + entry_length(img, dir_entry(img, b, previous))) < where.offset)
		previous = next;
	e = block_change(img, b, previous, 8);
	entry_set_length(img, e, next - previous + entry_length(img, dir_entry(img, b, where.offset)));
}

/* Make the name at *where* that of another inode. */
void dir_replace(x3_image *img, uint32_t ino, struct x3_place where, uint32_t target, uint32_t mode)
{
	struct inode dir = change_dir(img, ino);
	entry *e = block_change(img, dir_block(img, &dir, where.block), where.offset, 8);

	e->inode = target;
	if (img->filetype)
		e->file_type = entry_type(img, mode);
}

bool dir_is_empty(x3_image *img, uint32_t ino)
{
	struct inode dir = get_dir(img, ino);
	uint64_t blocks = dir_blocks(img, &dir);

	for (uint64_t at = 0; at < blocks; at++) {
		struct block *b = dir_block(img, &dir, at);
		for (uint32_t offset = 0; offset < img->bs;) {
			entry *e = dir_entry(img, b, offset);
			if (e->inode && !is_dots(e))
				return false;
			offset += entry_length(img, e);
		}
	}
	return true;
}

/* The entry ".." of a directory. */
entry *dir_parent(x3_image *img, uint32_t ino, struct block **block)
{
	struct inode dir = get_dir(img, ino);
	struct block *b = dir_block(img, &dir, 0);
	uint32_t first = entry_length(img, dir_entry(img, b, 0));
	entry *e = first < img->bs ? dir_entry(img, b, first) : NULL;

	if (!e || !e->inode || e->name_len != 2 || !is_dots(e))
		fail(img, EUCLEAN, "directory %u has no ..", ino);
	if (block)
		*block = b;
	return e;
}

/* Whether *ino* is the directory *dir*, or above it. */
bool dir_is_above(x3_image *img, uint32_t ino, uint32_t dir)
{
	uint32_t at = dir, seen = 0;

	for (uint64_t steps = 1, limit = 2; at != ino; steps++) {
		if (at == EXT2_ROOT_INO)
			return false;
		if (steps == limit) { /* Brent's algorithm: a cycle of any length returns to a saved value */
			seen = at;
			limit *= 2;
		}
		at = dir_parent(img, at, NULL)->inode;
		if (at == seen)
			fail(img, EUCLEAN, "directory %u is not below the root", dir);
	}
	return true;
}

/* Make ".." lead to another directory. */
void dir_set_parent(x3_image *img, uint32_t ino, uint32_t parent)
{
	struct block *b;
	entry *e = dir_parent(img, ino, &b);

	block_change(img, b, (char *)e - b->data, 4);
	e->inode = parent;
	img->changed[ino % 4096] = img->lasting[ino % 4096] = img->tid;
}


/* --- listing --- */

/* See x3_readdir. */
int64_t dir_list(x3_image *img, uint32_t ino, uint64_t *cursor, char *buf, uint64_t cap)
{
	struct inode dir = get_dir(img, ino);
	uint64_t blocks = dir_blocks(img, &dir), at;
	char *p = buf;

	if (cap < 4 * (uint64_t)img->bs)
		fail(img, ERANGE, "too small a buffer");
	/* In this format, the names of a block take at most four thirds of the block's size. */
	for (at = *cursor; at < blocks && (uint64_t)(p - buf) + 2 * img->bs <= cap; at++) {
		struct block *b = dir_block(img, &dir, at);
		for (uint32_t offset = 0; offset < img->bs;) {
			entry *e = dir_entry(img, b, offset);
			if (e->inode && !is_dots(e)) {
				uint32_t head[2] = { e->inode, at };
				uint16_t short_offset = offset;
				if (memchr(e->name, '/', e->name_len) || memchr(e->name, 0, e->name_len))
					fail(img, EUCLEAN, "directory %u has an impossible name", ino);
				memcpy(p, head, 8);
				memcpy(p + 8, &short_offset, 2);
				p[10] = e->file_type;
				p[11] = e->name_len;
				memcpy(p + 12, e->name, e->name_len);
				p += 12 + e->name_len;
			}
			offset += entry_length(img, e);
		}
	}
	*cursor = at;
	return p - buf;
}
