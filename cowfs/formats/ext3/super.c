/*
 * The superblock and the group descriptors: whether we support this filesystem, its geometry, and features
 * that must be set before their use.
 */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "internal.h"

/* The kernel's EXT3_FEATURE_*_SUPP, and sparse_super2, which the kernel tolerates. */
#define COMPAT                                                                                                    \
	(EXT2_FEATURE_COMPAT_DIR_PREALLOC | EXT2_FEATURE_COMPAT_IMAGIC_INODES | EXT3_FEATURE_COMPAT_HAS_JOURNAL | \
	 EXT2_FEATURE_COMPAT_EXT_ATTR | EXT2_FEATURE_COMPAT_RESIZE_INODE | EXT2_FEATURE_COMPAT_DIR_INDEX |        \
	 EXT4_FEATURE_COMPAT_SPARSE_SUPER2)
#define INCOMPAT (EXT2_FEATURE_INCOMPAT_FILETYPE | EXT3_FEATURE_INCOMPAT_RECOVER | EXT2_FEATURE_INCOMPAT_META_BG)
#define BTREE_DIR 4 /* reserved, never used */
#define RO_COMPAT (EXT2_FEATURE_RO_COMPAT_SPARSE_SUPER | EXT2_FEATURE_RO_COMPAT_LARGE_FILE | BTREE_DIR)
#define GROUP_MAX 65528       /* the counts of a group have 16 bits */
#define GROUPS_MAX (1u << 19) /* 2^32 blocks of 1 KiB, in groups of the largest size */


/* --- reading --- */

/* Whether we support all features of this filesystem; if not, a message names the others. */
static int check_features(x3_image *img, const struct ext2_super_block *sb)
{
	uint32_t unknown[3] = { sb->s_feature_compat & ~COMPAT, sb->s_feature_incompat & ~INCOMPAT,
				sb->s_feature_ro_compat & ~RO_COMPAT };

	if (unknown[0] || unknown[1] || unknown[2])
		snprintf(img->message, sizeof img->message, "not an ext3 filesystem: features %#x %#x %#x are unknown",
			 unknown[0], unknown[1], unknown[2]);
	else if (!(sb->s_feature_compat & EXT3_FEATURE_COMPAT_HAS_JOURNAL))
		snprintf(img->message, sizeof img->message, "it has no journal");
	else if (!sb->s_journal_inum)
		snprintf(img->message, sizeof img->message, "its journal is on another device");
	else if (sb->s_rev_level > EXT2_DYNAMIC_REV)
		snprintf(img->message, sizeof img->message, "unknown revision %u", sb->s_rev_level);
	else
		return 0;
	return -EOPNOTSUPP;
}

static bool makes_sense(const x3_image *img, const struct ext2_super_block *sb)
{
	return img->groups <= GROUPS_MAX && img->first_block == (img->bs == 1024) &&
	       img->blocks > img->first_block + 8 && img->blocks_per_group >= 8 &&
	       img->blocks_per_group <= min(img->bs * 8, GROUP_MAX) && img->blocks_per_group % 8 == 0 &&
	       img->inodes_per_group > 0 && img->inodes_per_group <= min(img->bs * 8, GROUP_MAX) &&
	       img->inode_size >= EXT2_GOOD_OLD_INODE_SIZE && img->inode_size <= img->bs &&
	       !(img->inode_size & (img->inode_size - 1)) && img->first_ino >= EXT2_GOOD_OLD_FIRST_INO &&
	       (uint64_t)img->groups * img->inodes_per_group == img->inodes && img->first_ino <= img->inodes &&
	       sb->s_journal_inum <= img->inodes;
}

/* Check the superblock, and take the geometry from it. */
int super_load(x3_image *img)
{
	struct ext2_super_block sb;
	struct stat st;
	uint32_t per_block;
	bool old;
	int error = io_read(img, &sb, sizeof sb, 1024);

	if (error)
		return error;
	if (sb.s_magic != EXT2_SUPER_MAGIC)
		return snprintf(img->message, sizeof img->message, "not an ext3 filesystem"), -EINVAL;
	img->opened = (struct x3_facts){ .compat = sb.s_feature_compat,
					 .incompat = sb.s_feature_incompat,
					 .ro_compat = sb.s_feature_ro_compat,
					 .state = sb.s_state };
	memcpy(img->opened.uuid, sb.s_uuid, 16);
	if (!img->patches.n) { /* the copy in the journal is older */
		img->mounted_at = sb.s_mtime;
		img->has_errors = sb.s_state & EXT2_ERROR_FS;
	}
	img->opened.state |= img->has_errors ? EXT2_ERROR_FS : 0;
	error = check_features(img, &sb);
	if (error)
		return error;
	snprintf(img->message, sizeof img->message, "the superblock is invalid");
	if (sb.s_log_block_size > 6 || !sb.s_blocks_per_group)
		return -EINVAL;
	old = sb.s_rev_level == EXT2_GOOD_OLD_REV; /* that revision does not have these two fields */
	img->bits = 10 + sb.s_log_block_size;
	img->bs = 1u << img->bits;
	img->blocks = sb.s_blocks_count;
	img->inodes = sb.s_inodes_count;
	img->first_block = sb.s_first_data_block;
	img->blocks_per_group = sb.s_blocks_per_group;
	img->inodes_per_group = sb.s_inodes_per_group;
	img->inode_size = old ? EXT2_GOOD_OLD_INODE_SIZE : sb.s_inode_size;
	img->first_ino = old ? EXT2_GOOD_OLD_FIRST_INO : sb.s_first_ino;
	img->filetype = sb.s_feature_incompat & EXT2_FEATURE_INCOMPAT_FILETYPE;
	img->dir_index = sb.s_feature_compat & EXT2_FEATURE_COMPAT_DIR_INDEX;
	img->groups = ((uint64_t)img->blocks - img->first_block + img->blocks_per_group - 1) / img->blocks_per_group;
	if (!makes_sense(img, &sb))
		return -EINVAL;
	if (fstat(img->fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size < (int64_t)img->blocks << img->bits) {
		snprintf(img->message, sizeof img->message, "the file is shorter than its filesystem");
		return -EINVAL;
	}
	img->message[0] = 0;
	img->size_max = data_size_max(img->bits);
	per_block = img->bs / sizeof(struct ext2_group_desc);
	img->gd_blocks = (img->groups + per_block - 1) / per_block;
	/* s_want_extra_isize means nothing without the feature extra_isize. */
	img->extra_isize = img->inode_size > EXT2_GOOD_OLD_INODE_SIZE ? 32 : 0;
	return 0;
}

/* Whether a group has a copy of the superblock. */
static bool has_super(const struct ext2_super_block *sb, uint32_t group)
{
	if (group == 0)
		return true;
	if (sb->s_feature_compat & EXT4_FEATURE_COMPAT_SPARSE_SUPER2)
		return group == sb->s_backup_bgs[0] || group == sb->s_backup_bgs[1];
	if (group == 1 || !(sb->s_feature_ro_compat & EXT2_FEATURE_RO_COMPAT_SPARSE_SUPER))
		return true;
	for (uint32_t base = 3; base <= 7; base += 2) {
		uint64_t power = base;
		while (power < group)
			power *= base;
		if (power == group)
			return true;
	}
	return false;
}

/* How many descriptor blocks are together at the beginning, and in each copy; see descriptors_at(). */
static uint32_t descriptors_together(const x3_image *img)
{
	if (img->sb->s_feature_incompat & EXT2_FEATURE_INCOMPAT_META_BG)
		return min(img->sb->s_first_meta_bg, img->gd_blocks);
	return img->gd_blocks;
}

/* Where group descriptor block number *i* is: with meta_bg in the first of the groups that it describes. */
static uint32_t descriptors_at(const x3_image *img, uint32_t i)
{
	uint32_t group = i * (img->bs / sizeof(struct ext2_group_desc));

	if (i < descriptors_together(img))
		return img->first_block + 1 + i;
	return img->first_block + group * img->blocks_per_group + has_super(img->sb, group);
}

/* How many of a group's first blocks are copies of the superblock and the descriptors. */
uint32_t group_copies(const x3_image *img, uint32_t group)
{
	uint32_t per_block = img->bs / sizeof(struct ext2_group_desc), together = descriptors_together(img);
	uint32_t in_meta = group % per_block, n = has_super(img->sb, group) ? 1 + together : 0;

	if (group / per_block >= together) /* a meta group keeps three copies */
		n += in_meta == 0 || in_meta == 1 || in_meta == per_block - 1;
	return n;
}

/* How many blocks of a group are neither data nor free. */
static uint32_t group_overhead(const x3_image *img, uint32_t group, uint32_t table)
{
	return group_copies(img, group) + 2 + table + (has_super(img->sb, group) ? img->sb->s_reserved_gdt_blocks : 0);
}

/* Whether a group has its own bitmaps and inode table, in places of their own: as ext4_check_descriptors(). */
static bool group_makes_sense(const x3_image *img, uint32_t group, const struct ext2_group_desc *gd, uint32_t table)
{
	uint64_t start = img->first_block + (uint64_t)group * img->blocks_per_group;
	uint64_t end = min(start + img->blocks_per_group, (uint64_t)img->blocks);
	uint64_t blocks = gd->bg_block_bitmap, inodes = gd->bg_inode_bitmap, first = gd->bg_inode_table;

	start += group_copies(img, group);
	return blocks >= start && blocks < end && inodes >= start && inodes < end && first >= start &&
	       first + table <= end && blocks != inodes && (blocks < first || blocks >= first + table) &&
	       (inodes < first || inodes >= first + table);
}

/* Load and pin the superblock and the group descriptors. */
void groups_load(x3_image *img)
{
	uint32_t table = (img->inodes_per_group * img->inode_size + img->bs - 1) >> img->bits;
	uint32_t free_blocks = 0, free_inodes = 0;

	img->sb_block = block_get(img, 1024 >> img->bits);
	img->sb_block->flags |= PINNED;
	img->sb = (struct ext2_super_block *)(img->sb_block->data + (1024 & (img->bs - 1)));
	for (uint32_t i = 0; i < img->gd_blocks; i++) {
		img->gd_block[i] = block_get(img, descriptors_at(img, i));
		img->gd_block[i]->flags |= PINNED;
	}
	img->overhead = img->first_block;
	for (uint32_t g = 0; g < img->groups; g++) {
		const struct ext2_group_desc *gd = group_get(img, g);
		if (!group_makes_sense(img, g, gd, table))
			fail(img, EINVAL, "group descriptor %u is invalid", g);
		img->overhead += group_overhead(img, g, table);
		free_blocks += gd->bg_free_blocks_count;
		free_inodes += gd->bg_free_inodes_count;
	}
	/* The kernel does not update these while it uses an image: after a crash they are wrong. */
	img->sb->s_free_blocks_count = min(free_blocks, img->blocks);
	img->sb->s_free_inodes_count = min(free_inodes, img->inodes);
}


/* --- changing --- */

static struct ext2_super_block *super_change(x3_image *img, uint32_t offset, uint32_t length)
{
	block_change(img, img->sb_block, (char *)img->sb - img->sb_block->data + offset, length);
	return img->sb;
}

/*
 * At the beginning, before anything else is written, without the journal: set the recovery flag; a revision
 * that has features; and how names are hashed, if that is not set yet: as in e2fsck, by the signedness of
 * char on this machine.
 */
void super_begin(x3_image *img)
{
	struct ext2_super_block *sb = img->sb;

	if (sb->s_rev_level == EXT2_GOOD_OLD_REV) {
		sb->s_rev_level = EXT2_DYNAMIC_REV;
		sb->s_first_ino = img->first_ino;
		sb->s_inode_size = img->inode_size;
	}
	if (img->dir_index && !(sb->s_flags & (EXT2_FLAGS_SIGNED_HASH | EXT2_FLAGS_UNSIGNED_HASH)))
		sb->s_flags |= CHAR_MIN < 0 ? EXT2_FLAGS_SIGNED_HASH : EXT2_FLAGS_UNSIGNED_HASH;
	sb->s_feature_incompat |= EXT3_FEATURE_INCOMPAT_RECOVER;
	sb->s_state |= img->has_errors ? EXT2_ERROR_FS : 0;
	sb->s_mtime = time(NULL);
	sb->s_mnt_count++;
}

/*
 * The filesystem is damaged and aborted: make the next user check all of it. Set both marks, since the log
 * may have the superblock without its own. It does not matter if they cannot be written.
 */
void super_mark_damaged(x3_image *img)
{
	uint16_t state = img->sb->s_state | EXT2_ERROR_FS;

	if (!io_write1(img, &state, sizeof state, 1024 + offsetof(struct ext2_super_block, s_state)))
		journal_mark_damaged(img);
}

/*
 * Set features that are about to be used: EXT2_FEATURE_COMPAT_*, and EXT2_FEATURE_RO_COMPAT_*. Within a
 * change.
 */
void super_need(x3_image *img, uint32_t compat, uint32_t ro_compat)
{
	struct ext2_super_block *sb = img->sb;

	if (!(compat & ~sb->s_feature_compat) && !(ro_compat & ~sb->s_feature_ro_compat))
		return;
	super_change(img, offsetof(struct ext2_super_block, s_feature_compat), 12);
	sb->s_feature_compat |= compat;
	sb->s_feature_ro_compat |= ro_compat;
}

/* Count blocks and inodes that become free, or used. */
void super_count(x3_image *img, int32_t blocks, int32_t inodes)
{
	struct ext2_super_block *sb = super_change(img, offsetof(struct ext2_super_block, s_free_blocks_count), 8);

	sb->s_free_blocks_count += blocks;
	sb->s_free_inodes_count += inodes;
}
