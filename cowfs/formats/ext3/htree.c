/*
 * Indexed directories (dir_index), as in fs/ext3/namei.c of Linux.
 *
 * Block 0 contains "." and "..", and behind them the root of the index. The root, and the index blocks below it (at
 * most one level), look like empty blocks to a reader that does not know indexes. An index is a sorted array of (hash,
 * block); the first entry has the count and the limit instead of a hash. The names in a leaf have hashes from that of
 * the leaf on. If the lowest bit of that hash is set, the leaf before also has names with the same hash.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <ext2fs/ext2fs.h>

#include "internal.h"

#define BLOCK_MASK 0x00ffffffu
#define HASH_END 0xfffffffeu
#define ROOT_INFO 24 /* where the root's struct ext2_dx_root_info is */

/* One index block on the way down. */
struct level {
	struct block *block;
	struct ext2_dx_entry *entries;
	uint32_t count, limit, chosen;
};

/* A name of a leaf that is split. */
struct name {
	uint32_t hash;
	uint16_t offset, size;
};

static struct ext2_dx_countlimit *counts(struct level *l)
{
	return (struct ext2_dx_countlimit *)l->entries;
}

static struct ext2_dx_root_info *root_info(struct block *root)
{
	return (struct ext2_dx_root_info *)(root->data + ROOT_INFO);
}

static uint32_t root_limit(const x3_image *img)
{
	return (img->bs - ROOT_INFO - 8) / 8;
}

static uint32_t node_limit(const x3_image *img)
{
	return (img->bs - 8) / 8;
}

static uint32_t hash_name(x3_image *img, uint8_t version, const char *name, uint32_t len)
{
	ext2_dirhash_t hash, minor;

	if (img->sb->s_flags & EXT2_FLAGS_UNSIGNED_HASH)
		version += EXT2_HASH_LEGACY_UNSIGNED;
	if (ext2fs_dirhash(version, name, len, img->sb->s_hash_seed, &hash, &minor))
		fail(img, EUCLEAN, "an unknown hash");
	hash &= ~1u;
	return hash == HASH_END ? HASH_END - 2 : hash; /* as in ext4fs_dirhash() */
}

/* Whether the directory has an index in a supported format. */
bool htree_usable(x3_image *img, const struct inode *dir)
{
	const struct ext2_dx_root_info *info;
	struct block *root;

	if (!img->dir_index || !(dir->raw->i_flags & EXT2_INDEX_FL))
		return false;
	root = dir_block(img, dir, 0);
	info = root_info(root);
	return dir_entry(img, root, 0)->rec_len == 12 && entry_length(img, dir_entry(img, root, 12)) == img->bs - 12 &&
	       info->reserved_zero == 0 && info->hash_version <= EXT2_HASH_TEA && info->info_length == 8 &&
	       info->indirect_levels <= 1 && !(info->unused_flags & EXT2_HASH_FLAG_INCOMPAT);
}

/* Choose the entry of an index block under which *hash* belongs. */
static struct level choose(x3_image *img, struct block *b, uint32_t offset, uint32_t limit, uint32_t hash)
{
	struct level l = { b, (struct ext2_dx_entry *)(b->data + offset), 0, limit, 0 };
	uint32_t low = 1, high;

	l.count = high = counts(&l)->count;
	if (counts(&l)->limit != limit || l.count == 0 || l.count > limit)
		fail(img, EUCLEAN, "index block %u is damaged", b->nr);
	while (low < high) {
		uint32_t middle = (low + high) / 2;
		if (l.entries[middle].hash > hash)
			high = middle;
		else
			low = middle + 1;
	}
	l.chosen = low - 1;
	return l;
}

/* Insert a new entry after the chosen one. There must be space for it. */
static void insert_entry(x3_image *img, struct level *l, uint32_t hash, uint32_t block)
{
	uint32_t at = l->chosen + 1;
	uint32_t start = (char *)l->entries - l->block->data;

	block_change(img, l->block, start, 8 * (l->count + 1));
	memmove(l->entries + at + 1, l->entries + at, 8 * (l->count - at));
	l->entries[at] = (struct ext2_dx_entry){ hash, block };
	counts(l)->count = ++l->count;
}

/* Make an empty index block. */
static struct level new_node(x3_image *img, struct inode *dir, uint32_t *at)
{
	struct block *b = dir_append(img, dir, at);
	struct level l = { b, (struct ext2_dx_entry *)(b->data + 8), 0, node_limit(img), 0 };

	counts(&l)->limit = l.limit;
	return l;
}

/* Fill an index block with entries. The counts replace the hash of the first one. */
static void fill_node(struct level *l, const struct ext2_dx_entry *from, uint32_t count)
{
	memcpy(l->entries, from, 8 * count);
	l->count = count;
	*counts(l) = (struct ext2_dx_countlimit){ l->limit, count };
}

/*
 * Make room for one more entry in the lowest index block of *path*, which has *depth* + 1 blocks. ENOSPC: the
 * index has two full levels.
 */
static void make_room(x3_image *img, struct inode *dir, struct level *path, int *depth, uint32_t hash)
{
	struct level *low = &path[*depth], node;
	uint32_t at, half;

	if (low->count < low->limit)
		return;
	if (*depth == 0) { /* move the root's entries down one level */
		node = new_node(img, dir, &at);
		fill_node(&node, low->entries, low->count);
		block_change(img, low->block, 0, img->bs);
		root_info(low->block)->indirect_levels = 1;
		low->entries[0].block = at;
		counts(low)->count = low->count = 1;
		node.chosen = low->chosen;
		low->chosen = 0;
		path[++*depth] = node;
		return;
	}
	if (path[0].count == path[0].limit)
		fail(img, ENOSPC, "the index of directory %u is full", dir->ino);
	node = new_node(img, dir, &at);
	half = low->count / 2;
	uint32_t first = low->entries[half].hash;
	fill_node(&node, low->entries + half, low->count - half);
	block_change(img, low->block, 8, 8);
	counts(low)->count = low->count = half;
	insert_entry(img, &path[0], first, at);
	if (hash >= first) {
		node.chosen = low->chosen - half;
		path[0].chosen++;
		*low = node;
	}
}

static int by_hash(const void *a, const void *b)
{
	const struct name *x = a, *y = b;

	return x->hash != y->hash ? (x->hash > y->hash ? 1 : -1) : x->offset - y->offset;
}

/* Fill a directory block, which is being changed, with some of the names of another (a copy of) block. */
static void refill(x3_image *img, char *data, const char *from, const struct name *names, uint32_t n)
{
	entry *e = (entry *)data;
	uint32_t at = 0, size = 0;

	memset(e, 0, 8); /* if there are none */
	for (uint32_t i = 0; i < n; i++) {
		e = (entry *)(data + at);
		size = names[i].size;
		memcpy(e, from + names[i].offset, size);
		entry_set_length(img, e, size);
		at += size;
	}
	entry_set_length(img, e, size + img->bs - at);
}

/* Move the upper half of a leaf's names into a new leaf, and return the leaf to which *hash* belongs. */
static struct block *split_leaf(x3_image *img, struct inode *dir, struct level *low, struct block *leaf,
				uint8_t version, uint32_t hash, uint32_t *at)
{
	struct name names[BLOCK_MAX / 12];
	char copy[BLOCK_MAX];
	uint32_t n = 0, split, moved = 0, new_at;
	struct block *new_leaf;
	bool same;

	for (uint32_t offset = 0; offset < img->bs;) {
		entry *e = dir_entry(img, leaf, offset);
		if (e->inode)
			names[n++] = (struct name){ hash_name(img, version, e->name, e->name_len), offset,
						    RECORD(e->name_len) };
		offset += entry_length(img, e);
	}
	if (n < 2)
		fail(img, EUCLEAN, "directory block %u is invalid", leaf->nr);
	qsort(names, n, sizeof *names, by_hash);
	for (split = n; split > 1 && moved + names[split - 1].size <= img->bs / 2; split--)
		moved += names[split - 1].size;
	split = min(split, n - 1);
	new_leaf = dir_append(img, dir, &new_at);
	same = names[split].hash == names[split - 1].hash;
	memcpy(copy, leaf->data, img->bs);
	refill(img, new_leaf->data, copy, names + split, n - split);
	refill(img, block_change(img, leaf, 0, img->bs), copy, names, split);
	insert_entry(img, low, names[split].hash + same, new_at);
	if (hash < names[split].hash)
		return leaf;
	*at = new_at;
	return new_leaf;
}

/* The block to which the chosen entry of an index block leads. */
static uint32_t chosen_block(x3_image *img, const struct inode *dir, const struct level *l)
{
	uint32_t at = l->entries[l->chosen].block & BLOCK_MASK;

	if (at >= dir_blocks(img, dir))
		fail(img, EUCLEAN, "the index of directory %u leads out of it", dir->ino);
	return at;
}

/* Find the leaf for a hash; *path* leads there, and has *depth* + 1 index blocks. */
static uint32_t descend(x3_image *img, const struct inode *dir, uint32_t hash, struct level *path, int *depth)
{
	struct block *root = dir_block(img, dir, 0);
	uint32_t at;

	path[0] = choose(img, root, ROOT_INFO + 8, root_limit(img), hash);
	for (*depth = 0; *depth < root_info(root)->indirect_levels;) {
		at = chosen_block(img, dir, &path[*depth]);
		path[++*depth] = choose(img, dir_block(img, dir, at), 8, node_limit(img), hash);
	}
	return chosen_block(img, dir, &path[*depth]);
}

/* The block of an indexed directory that contains a name if the name exists, except for hash collisions. */
uint32_t htree_find(x3_image *img, const struct inode *dir, const char *name, uint32_t len)
{
	uint8_t version = root_info(dir_block(img, dir, 0))->hash_version;
	struct level path[2];
	int depth;

	return descend(img, dir, hash_name(img, version, name, len), path, &depth);
}

/* Go to the next leaf, if it has names with the same hash. */
static bool next_leaf(x3_image *img, const struct inode *dir, uint32_t hash, struct level *path, int depth,
		      uint32_t *at)
{
	int level = depth;

	while (path[level].chosen + 1 >= path[level].count)
		if (level-- == 0)
			return false;
	path[level].chosen++;
	if ((path[level].entries[path[level].chosen].hash & ~1u) != hash)
		return false;
	for (; level < depth; level++) {
		struct block *b = dir_block(img, dir, chosen_block(img, dir, &path[level]));
		path[level + 1] = choose(img, b, 8, node_limit(img), 0);
	}
	*at = chosen_block(img, dir, &path[depth]);
	return true;
}

/* Find a name in an indexed directory; false if it is not there. */
bool htree_lookup(x3_image *img, const struct inode *dir, const char *name, uint32_t len, struct x3_place *where)
{
	uint8_t version = root_info(dir_block(img, dir, 0))->hash_version;
	uint32_t hash = hash_name(img, version, name, len), at;
	struct level path[2];
	int depth;

	at = descend(img, dir, hash, path, &depth);
	do {
		if (dir_find_in(img, dir, at, name, len, ANY_INO, where))
			return true;
	} while (next_leaf(img, dir, hash, path, depth, &at));
	return false;
}

/* Add a name to an indexed directory, which is being changed. */
struct x3_place htree_insert(x3_image *img, struct inode *dir, const char *name, uint32_t len, uint32_t ino,
			     uint8_t type)
{
	uint8_t version = root_info(dir_block(img, dir, 0))->hash_version;
	uint32_t hash = hash_name(img, version, name, len), at;
	struct level path[2];
	struct block *leaf;
	int64_t offset;
	int depth;

	at = descend(img, dir, hash, path, &depth);
	leaf = dir_block(img, dir, at);
	offset = dir_put(img, leaf, name, len, ino, type);
	if (offset < 0) {
		make_room(img, dir, path, &depth, hash);
		leaf = split_leaf(img, dir, &path[depth], leaf, version, hash, &at);
		offset = dir_put(img, leaf, name, len, ino, type);
		if (offset < 0)
			fail(img, ENOSPC, "directory %u cannot be split for a name", dir->ino);
	}
	return (struct x3_place){ at, offset };
}

/* Give a directory of one full block, which is being changed, an index; false if it cannot have one. */
bool htree_make(x3_image *img, struct inode *dir)
{
	struct block *root = dir_block(img, dir, 0), *leaf;
	entry *dot = dir_entry(img, root, 0), *dotdot = dir_parent(img, dir->ino, NULL);
	struct name names[BLOCK_MAX / 12];
	uint32_t n = 0, at;

	if (!img->dir_index || img->sb->s_def_hash_version > EXT2_HASH_TEA || dot->rec_len != 12 ||
	    dot->name_len != 1 || dotdot->name_len != 2)
		return false;
	for (uint32_t offset = 12 + entry_length(img, dotdot); offset < img->bs;) {
		entry *e = dir_entry(img, root, offset);
		if (e->inode)
			names[n++] = (struct name){ 0, offset, RECORD(e->name_len) };
		offset += entry_length(img, e);
	}
	leaf = dir_append(img, dir, &at);
	refill(img, leaf->data, root->data, names, n);
	block_change(img, root, 0, img->bs);
	memset(root->data + ROOT_INFO, 0, img->bs - ROOT_INFO);
	entry_set_length(img, dotdot, img->bs - 12);
	root_info(root)->hash_version = img->sb->s_def_hash_version;
	root_info(root)->info_length = 8;
	struct level l = { root, (struct ext2_dx_entry *)(root->data + ROOT_INFO + 8), 0, root_limit(img), 0 };
	fill_node(&l, &(struct ext2_dx_entry){ 0, at }, 1);
	dir->raw->i_flags |= EXT2_INDEX_FL;
	return true;
}
