/*
 * Opening, closing, and the entry points that engine.h promises.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

#define COMPAT                                                                         \
	(EXT2_FEATURE_COMPAT_DIR_PREALLOC | EXT3_FEATURE_COMPAT_HAS_JOURNAL |          \
	 EXT2_FEATURE_COMPAT_EXT_ATTR | EXT2_FEATURE_COMPAT_RESIZE_INODE | EXT2_FEATURE_COMPAT_DIR_INDEX)
#define INCOMPAT (EXT2_FEATURE_INCOMPAT_FILETYPE | EXT3_FEATURE_INCOMPAT_RECOVER)
#define RO_COMPAT (EXT2_FEATURE_RO_COMPAT_SPARSE_SUPER | EXT2_FEATURE_RO_COMPAT_LARGE_FILE)

static __thread char message[256]; /* of an x3_open that failed, or a copy of an image's */


/* --- opening --- */

/* Check the superblock, and take the geometry from it. */
static int load_geometry(x3_image *img)
{
	struct ext2_super_block sb;
	struct stat st;
	int error = io_read(img, &sb, sizeof sb, 1024);

	if (error)
		return error;
	if (sb.s_magic != EXT2_SUPER_MAGIC)
		return snprintf(img->message, sizeof img->message, "no ext3 filesystem"), -EINVAL;
	img->opened = (struct x3_facts){ .compat = sb.s_feature_compat, .incompat = sb.s_feature_incompat,
					 .ro_compat = sb.s_feature_ro_compat, .state = sb.s_state };
	memcpy(img->opened.uuid, sb.s_uuid, 16);
	if (sb.s_feature_compat & ~COMPAT || sb.s_feature_incompat & ~INCOMPAT || sb.s_feature_ro_compat & ~RO_COMPAT ||
	    !(sb.s_feature_compat & EXT3_FEATURE_COMPAT_HAS_JOURNAL) || !sb.s_journal_inum) {
		snprintf(img->message, sizeof img->message, "no ext3 filesystem: its features are %#x %#x %#x",
			 sb.s_feature_compat, sb.s_feature_incompat, sb.s_feature_ro_compat);
		return -EOPNOTSUPP;
	}
	snprintf(img->message, sizeof img->message, "the superblock makes no sense");
	if (sb.s_rev_level != EXT2_DYNAMIC_REV || sb.s_log_block_size > 2)
		return -EINVAL;
	img->bits = 10 + sb.s_log_block_size;
	img->bs = 1u << img->bits;
	img->blocks = sb.s_blocks_count;
	img->inodes = sb.s_inodes_count;
	img->first_block = sb.s_first_data_block;
	img->blocks_per_group = sb.s_blocks_per_group;
	img->inodes_per_group = sb.s_inodes_per_group;
	img->inode_size = sb.s_inode_size;
	img->first_ino = sb.s_first_ino;
	img->filetype = sb.s_feature_incompat & EXT2_FEATURE_INCOMPAT_FILETYPE;
	img->dir_index = sb.s_feature_compat & EXT2_FEATURE_COMPAT_DIR_INDEX;
	if (img->first_block != (img->bs == 1024) || img->blocks <= img->first_block + 8 ||
	    img->blocks_per_group < 8 || img->blocks_per_group > img->bs * 8 || img->blocks_per_group % 8 ||
	    img->inodes_per_group == 0 || img->inodes_per_group > img->bs * 8 || img->inode_size < 128 ||
	    img->inode_size > img->bs || img->inode_size & (img->inode_size - 1) || img->first_ino < 11)
		return -EINVAL;
	img->groups = (img->blocks - img->first_block + img->blocks_per_group - 1) / img->blocks_per_group;
	if ((uint64_t)img->groups * img->inodes_per_group != img->inodes || img->first_ino > img->inodes ||
	    sb.s_journal_inum > img->inodes)
		return -EINVAL;
	if (fstat(img->fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size < (int64_t)img->blocks << img->bits) {
		snprintf(img->message, sizeof img->message, "the file is shorter than its filesystem");
		return -EINVAL;
	}
	img->message[0] = 0;
	img->size_max = data_size_max(img->bits);
	if (img->inode_size > EXT2_GOOD_OLD_INODE_SIZE) {
		img->extra_isize = max(sb.s_want_extra_isize, 32);
		if (img->extra_isize % 4 || img->extra_isize > img->inode_size - EXT2_GOOD_OLD_INODE_SIZE)
			img->extra_isize = 32;
	}
	return 0;
}

/* Whether a group has a copy of the superblock and the group descriptors. */
static bool has_super(const struct ext2_super_block *sb, uint32_t group)
{
	if (group <= 1 || !(sb->s_feature_ro_compat & EXT2_FEATURE_RO_COMPAT_SPARSE_SUPER))
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

/* Load and pin the superblock and the group descriptors. */
static void load_groups(x3_image *img)
{
	uint32_t per_block = img->bs / sizeof(struct ext2_group_desc), n = (img->groups + per_block - 1) / per_block;
	uint32_t table = ((img->inodes_per_group * img->inode_size + img->bs - 1) >> img->bits);

	img->sb_block = block_get(img, 1024 >> img->bits);
	img->sb_block->flags |= PINNED;
	img->sb = (struct ext2_super_block *)(img->sb_block->data + (1024 & (img->bs - 1)));
	for (uint32_t i = 0; i < n; i++) {
		img->gd_block[i] = block_get(img, img->first_block + 1 + i);
		img->gd_block[i]->flags |= PINNED;
	}
	img->overhead = img->first_block;
	for (uint32_t g = 0; g < img->groups; g++) {
		const struct ext2_group_desc *gd = group_get(img, g);
		if (gd->bg_block_bitmap <= img->first_block || gd->bg_block_bitmap >= img->blocks ||
		    gd->bg_inode_bitmap <= img->first_block || gd->bg_inode_bitmap >= img->blocks ||
		    gd->bg_inode_table <= img->first_block || gd->bg_inode_table > img->blocks - table)
			fail(img, EINVAL, "group descriptor %u makes no sense", g);
		img->overhead += 2 + table + (has_super(img->sb, g) ? 1 + n + img->sb->s_reserved_gdt_blocks : 0);
	}
}

/* Delete or truncate what is on the orphan list, be it from a crash, or because it was in use. */
static int clean_orphans(x3_image *img)
{
	int64_t result;

	do {
		CHANGE (img) {
			uint32_t ino = img->sb->s_last_orphan;
			op.result = ino != 0;
			if (ino && inode_get(img, ino).raw->i_links_count == 0)
				inode_delete_some(img, ino, true);
			else if (ino)
				data_truncate_more(img, ino);
		}
		result = op_finish(&op);
	} while (result > 0);
	return result;
}

static int load(x3_image *img)
{
	uint32_t buckets = 1024, per_block;
	int error = load_geometry(img);

	if (error)
		return error;
	img->cached_max = (img->cache_bytes ? img->cache_bytes : 64 << 20) >> img->bits;
	img->cached_max = max(img->cached_max, (size_t)256);
	while (buckets < img->cached_max && buckets < 1u << 24)
		buckets *= 2;
	per_block = img->bs / sizeof(struct ext2_group_desc);
	img->bucket_mask = buckets - 1;
	img->bucket = calloc(buckets, sizeof *img->bucket);
	img->gd_block = calloc((img->groups + per_block - 1) / per_block, sizeof *img->gd_block);
	img->hold = calloc(img->groups, sizeof *img->hold);
	if (!img->bucket || !img->gd_block || !img->hold)
		return -ENOMEM;
	if (img->opened.incompat & EXT3_FEATURE_INCOMPAT_RECOVER) {
		snprintf(img->message, sizeof img->message, "the journal must be replayed first");
		return -EUCLEAN;
	}
	QUERY (img) { /* nothing is written before all of this is known to be sound */
		load_groups(img);
		journal_load(img);
		orphan_check(img);
		if (img->sb->s_overhead_clusters)
			img->overhead = img->sb->s_overhead_clusters;
		else
			img->overhead += img->jlen;
	}
	error = op_finish(&op);
	if (error || img->read_only)
		return error == -EUCLEAN || error == -ESTALE ? -EBADMSG : error;
	for (size_t i = 0; i < 4096; i++)
		img->changed[i] = img->lasting[i] = img->committed;
	if (getrandom(&img->random, sizeof img->random, GRND_NONBLOCK) < 0)
		img->random = now_ns();
	error = journal_start(img);
	return error ? error : clean_orphans(img);
}

/* Forget all that load() has made, and what came of it. */
static void unload(x3_image *img)
{
	if (img->bucket)
		cache_free(img);
	for (uint32_t g = 0; img->hold && g < img->groups; g++)
		free(img->hold[g]);
	free(img->hold);
	free(img->gd_block);
	free(img->jmap);
	img->hold = NULL;
	img->gd_block = NULL;
	img->jmap = NULL;
	img->sb = NULL;
}

static void release(x3_image *img)
{
	unload(img);
	free(img->dirty);
	free(img->logging);
	free(img->logged);
	free(img->log);
	free(img->held.run);
	free(img->held_logging.run);
	free(img->held_logged.run);
	close(img->fd);
	if (img->trace_fd >= 0)
		close(img->trace_fd);
	pthread_mutex_destroy(&img->io_lock);
	pthread_mutex_destroy(&img->lock);
	pthread_cond_destroy(&img->wake);
	free(img);
}

int x3_open(int fd, uint32_t flags, uint64_t cache_bytes, int trace_fd, uint32_t debug, x3_image **out)
{
	x3_image *img = calloc(1, sizeof *img);
	int error;

	*out = NULL;
	message[0] = 0;
	if (!img)
		return -ENOMEM;
	img->read_only = flags & X3_READ_ONLY;
	img->debug = debug;
	img->cache_bytes = cache_bytes;
	img->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	img->trace_fd = trace_fd < 0 ? -1 : fcntl(trace_fd, F_DUPFD_CLOEXEC, 3);
	pthread_mutex_init(&img->io_lock, NULL);
	pthread_mutex_init(&img->lock, NULL);
	pthread_cond_init(&img->wake, NULL);
	if (img->fd < 0 || (trace_fd >= 0 && img->trace_fd < 0))
		error = -errno;
	else
		error = load(img);
	if (error) {
		snprintf(message, sizeof message, "%s", img->message[0] ? img->message : strerror(-error));
		release(img);
		return error;
	}
	*out = img;
	return 0;
}

int x3_close(x3_image *img)
{
	int error = img->aborted ? -EIO : 0;

	if (!img->read_only && !img->suspended && !error) {
		error = clean_orphans(img);
		if (!error)
			error = x3_checkpoint(img);
		if (!error)
			error = journal_finish(img);
	}
	release(img);
	return error;
}

void x3_abandon(x3_image *img)
{
	release(img);
}

int x3_facts(x3_image *img, struct x3_facts *out)
{
	QUERY (img) {
		*out = img->opened;
		out->block_size = img->bs;
		out->inode_size = img->inode_size;
		out->blocks = img->blocks;
		out->free_blocks = img->sb->s_free_blocks_count;
		out->reserved = img->sb->s_r_blocks_count;
		out->overhead = img->overhead;
		out->inodes = img->inodes;
		out->free_inodes = img->sb->s_free_inodes_count;
		out->journal_blocks = img->jlen;
		out->journal_used = img->jhead - img->jfirst;
		out->tid = img->tid;
		out->committed = img->committed;
		out->aborted = img->aborted;
		out->dirty = img->ndirty;
		out->cached = img->cached;
		out->held = img->nheld;
		out->commits = img->commits;
		out->checkpoints = img->checkpoints;
		out->barriers = __atomic_load_n(&img->barriers, __ATOMIC_RELAXED);
		out->bytes_written = __atomic_load_n(&img->bytes_written, __ATOMIC_RELAXED);
	}
	return op_finish(&op);
}

const char *x3_message(x3_image *img)
{
	if (img) {
		pthread_mutex_lock(&img->lock);
		memcpy(message, img->message, sizeof message);
		pthread_mutex_unlock(&img->lock);
	}
	return message;
}


/* --- inodes --- */

int x3_getattr(x3_image *img, uint32_t ino, struct x3_attr *out)
{
	QUERY (img) {
		struct inode in = inode_get(img, ino);
		inode_attr(img, &in, out);
	}
	return op_finish(&op);
}

int x3_setattr(x3_image *img, uint32_t ino, uint32_t what, const struct x3_attr *attr)
{
	CHANGE (img) {
		struct inode in = inode_change(img, ino, what & (X3_MODE | X3_UID | X3_GID));
		if (what & X3_MODE)
			in.raw->i_mode = (in.raw->i_mode & S_IFMT) | (attr->mode & 07777);
		if (what & X3_UID) {
			in.raw->i_uid = attr->uid;
			in.raw->osd2.linux2.l_i_uid_high = attr->uid >> 16;
		}
		if (what & X3_GID) {
			in.raw->i_gid = attr->gid;
			in.raw->osd2.linux2.l_i_gid_high = attr->gid >> 16;
		}
		inode_times(img, &in, what & X3_ATIME, attr->atime_ns);
		inode_times(img, &in, what & X3_MTIME, attr->mtime_ns);
		inode_times(img, &in, CTIME, now_ns());
	}
	return op_finish(&op);
}

int64_t x3_readlink(x3_image *img, uint32_t ino, void *buf, uint64_t cap)
{
	QUERY (img) {
		struct inode in = inode_get(img, ino);
		const char *target = (const char *)in.raw->i_block;
		uint32_t size = in.raw->i_size;
		if (!S_ISLNK(in.raw->i_mode))
			fail(img, EINVAL, "no symlink");
		if (size >= (inode_is_mapped(img, &in) ? img->bs : sizeof in.raw->i_block))
			fail(img, EUCLEAN, "symlink %u makes no sense", ino);
		if (size > cap)
			fail(img, ERANGE, "too small a buffer");
		if (inode_is_mapped(img, &in))
			target = dir_block(img, &in, 0)->data;
		memcpy(buf, target, size);
		op.result = size;
	}
	return op_finish(&op);
}


/* --- names --- */

int64_t x3_readdir(x3_image *img, uint32_t dir, uint64_t *cursor, void *buf, uint64_t cap)
{
	QUERY (img)
		op.result = dir_list(img, dir, cursor, buf, cap);
	return op_finish(&op);
}

int64_t x3_parent(x3_image *img, uint32_t dir)
{
	QUERY (img)
		op.result = dir_parent(img, dir, NULL)->inode;
	return op_finish(&op);
}

/* Let a directory have more or fewer subdirectories. EMLINK. */
static void add_links(x3_image *img, uint32_t ino, int count)
{
	struct inode in = inode_change(img, ino, true);

	if (in.raw->i_links_count + count > X3_LINK_MAX)
		fail(img, EMLINK, "too many links");
	if (in.raw->i_links_count + count < 2)
		fail(img, EUCLEAN, "directory %u has too few links", ino);
	in.raw->i_links_count += count;
	inode_times(img, &in, CTIME, now_ns());
}

int x3_create(x3_image *img, uint32_t dir, const char *name, uint32_t len, uint32_t hint, struct x3_new *n)
{
	CHANGE (img) {
		struct inode in = inode_make(img, dir, n);
		if (S_ISDIR(n->mode))
			add_links(img, dir, 1);
		n->place = dir_insert(img, dir, name, len, in.ino, n->mode, hint);
		n->ino = in.ino;
		inode_attr(img, &in, &n->attr);
	}
	return op_finish(&op);
}

int x3_link(x3_image *img, uint32_t ino, uint32_t dir, const char *name, uint32_t len, uint32_t hint,
	    struct x3_place *place)
{
	CHANGE (img) {
		struct inode in = inode_change(img, ino, true);
		bool orphan = in.raw->i_links_count == 0, is_dir = S_ISDIR(in.raw->i_mode);
		if (is_dir && !orphan)
			fail(img, EPERM, "a directory");
		if (in.raw->i_links_count >= X3_LINK_MAX)
			fail(img, EMLINK, "too many links");
		if (orphan)
			orphan_remove(img, &in);
		in.raw->i_links_count += is_dir ? 2 : 1;
		if (is_dir) {
			dir_set_parent(img, ino, dir);
			add_links(img, dir, 1);
		}
		inode_times(img, &in, CTIME, now_ns());
		*place = dir_insert(img, dir, name, len, ino, in.raw->i_mode, hint);
	}
	return op_finish(&op);
}

/* Free what is left of an orphan, operation by operation. */
static int delete_rest(x3_image *img, uint32_t ino)
{
	int64_t result;

	do {
		CHANGE (img)
			op.result = !inode_delete_some(img, ino, true);
		result = op_finish(&op);
	} while (result > 0);
	return result;
}

/* Fail unless an inode is what the call is for. */
static struct inode want_type(x3_image *img, uint32_t ino, bool is_dir)
{
	struct inode in = inode_get(img, ino);

	if (!!S_ISDIR(in.raw->i_mode) != is_dir)
		fail(img, is_dir ? ENOTDIR : EISDIR, "of the wrong type");
	if (is_dir && !dir_is_empty(img, ino))
		fail(img, ENOTEMPTY, "not empty");
	return in;
}

static int remove_name(x3_image *img, uint32_t dir, const char *name, uint32_t len, struct x3_place where,
		       uint32_t ino, bool keep, bool is_dir)
{
	int64_t result;

	CHANGE (img) {
		struct inode in = inode_get(img, dir);
		struct x3_place found = dir_find(img, &in, name, len, where, ino);
		want_type(img, ino, is_dir);
		dir_remove(img, dir, found);
		if (is_dir)
			add_links(img, dir, -1);
		op.result = inode_drop_link(img, ino, keep);
	}
	result = op_finish(&op);
	return result == HAS_REST ? delete_rest(img, ino) : result;
}

int x3_unlink(x3_image *img, uint32_t dir, const char *name, uint32_t len, struct x3_place where, uint32_t ino,
	      int keep)
{
	return remove_name(img, dir, name, len, where, ino, keep, false);
}

int x3_rmdir(x3_image *img, uint32_t dir, const char *name, uint32_t len, struct x3_place where, uint32_t ino,
	     int keep)
{
	return remove_name(img, dir, name, len, where, ino, keep, true);
}

int x3_release(x3_image *img, uint32_t ino)
{
	int64_t result;

	CHANGE (img) {
		if (inode_get(img, ino).raw->i_links_count == 0)
			op.result = !inode_delete_some(img, ino, true);
	}
	result = op_finish(&op);
	return result > 0 ? delete_rest(img, ino) : result;
}

static void touch(x3_image *img, uint32_t ino)
{
	struct inode in = inode_change(img, ino, false);

	inode_times(img, &in, CTIME, now_ns());
}

static void exchange(x3_image *img, struct x3_rename *how, struct x3_place source, uint32_t mode)
{
	struct inode dir = inode_get(img, how->target_dir), other = inode_get(img, how->replaced);
	bool moved_dir = S_ISDIR(mode), other_dir = S_ISDIR(other.raw->i_mode);

	how->place = dir_find(img, &dir, how->target_name, how->target_len, how->target_place, how->replaced);
	dir_replace(img, how->source_dir, source, how->replaced, other.raw->i_mode);
	dir_replace(img, how->target_dir, how->place, how->ino, mode);
	if (how->source_dir != how->target_dir) {
		if (moved_dir)
			dir_set_parent(img, how->ino, how->target_dir);
		if (other_dir)
			dir_set_parent(img, how->replaced, how->source_dir);
		if (moved_dir != other_dir) {
			add_links(img, how->source_dir, other_dir - moved_dir);
			add_links(img, how->target_dir, moved_dir - other_dir);
		}
	}
	touch(img, how->replaced);
}

/* Let the target name be *ino*'s; what became of the inode that had it? */
static enum fate take_target(x3_image *img, struct x3_rename *how, uint32_t mode)
{
	bool is_dir = S_ISDIR(mode);
	struct inode dir = inode_get(img, how->target_dir);

	if (!how->replaced) {
		how->place = dir_insert(img, how->target_dir, how->target_name, how->target_len, how->ino, mode,
					how->hint);
		return LIVES;
	}
	how->place = dir_find(img, &dir, how->target_name, how->target_len, how->target_place, how->replaced);
	want_type(img, how->replaced, is_dir);
	dir_replace(img, how->target_dir, how->place, how->ino, mode);
	if (is_dir)
		add_links(img, how->target_dir, -1);
	return inode_drop_link(img, how->replaced, how->flags & X3_KEEP);
}

/* Put a character device 0:0 where the source was. */
static void leave_whiteout(x3_image *img, struct x3_rename *how, struct x3_place source)
{
	struct x3_new new = { .mode = S_IFCHR, .uid = how->uid, .gid = how->gid };

	how->whiteout = inode_make(img, how->source_dir, &new).ino;
	dir_replace(img, how->source_dir, source, how->whiteout, S_IFCHR);
}

int x3_rename(x3_image *img, struct x3_rename *how)
{
	int64_t result;

	how->whiteout = 0;
	CHANGE (img) {
		uint32_t mode = inode_get(img, how->ino).raw->i_mode;
		struct inode dir = inode_get(img, how->source_dir);
		struct x3_place source = dir_find(img, &dir, how->source_name, how->source_len, how->source_place,
						  how->ino);
		if (how->ino == how->replaced)
			fail(img, EINVAL, "two names of one inode");
		if (how->flags & X3_EXCHANGE) {
			exchange(img, how, source, mode);
		} else {
			op.result = take_target(img, how, mode);
			/* The new name may have moved the old one. */
			source = dir_find(img, &dir, how->source_name, how->source_len, source, how->ino);
			if (how->flags & X3_WHITEOUT)
				leave_whiteout(img, how, source);
			else
				dir_remove(img, how->source_dir, source);
			if (S_ISDIR(mode) && how->source_dir != how->target_dir) {
				dir_set_parent(img, how->ino, how->target_dir);
				add_links(img, how->source_dir, -1);
				add_links(img, how->target_dir, 1);
			}
		}
		touch(img, how->ino);
	}
	result = op_finish(&op);
	return result == HAS_REST ? delete_rest(img, how->replaced) : result;
}


/* --- data --- */

static int64_t write_some(x3_image *img, uint32_t ino, const char *buf, uint64_t len, uint64_t off)
{
	CHANGE_DATA (img, ino)
		op.result = data_write(img, ino, buf, len, off);
	return op_finish(&op);
}

int64_t x3_write(x3_image *img, uint32_t ino, const void *buf, uint64_t len, uint64_t off)
{
	uint64_t done = 0;

	while (done < len) {
		int64_t n = write_some(img, ino, (const char *)buf + done, len - done, off + done);
		if (n < 0)
			return done ? (int64_t)done : n;
		done += n;
	}
	return done;
}

int x3_truncate(x3_image *img, uint32_t ino, uint64_t size)
{
	int64_t result;

	CHANGE_DATA (img, ANY_INODE) {
		op.result = !data_truncate(img, ino, size);
		if (op.result)
			img->busy = ino;
	}
	result = op_finish(&op);
	if (result <= 0)
		return result;
	do {
		CHANGE (img)
			op.result = !data_truncate_more(img, ino);
		result = op_finish(&op);
	} while (result > 0);
	pthread_mutex_lock(&img->lock);
	img->busy = 0;
	pthread_cond_broadcast(&img->wake);
	pthread_mutex_unlock(&img->lock);
	return result;
}

int64_t x3_segment(x3_image *img, uint32_t ino, uint64_t from, uint64_t *stop)
{
	QUERY (img)
		op.result = data_segment(img, ino, from, stop);
	return op_finish(&op);
}


/* --- extended attributes --- */

int64_t x3_listxattr(x3_image *img, uint32_t ino, void *buf, uint64_t cap)
{
	QUERY (img)
		op.result = xattr_list(img, ino, buf, cap);
	return op_finish(&op);
}

int64_t x3_getxattr(x3_image *img, uint32_t ino, const char *name, uint32_t len, void *buf, uint64_t cap)
{
	QUERY (img)
		op.result = xattr_get(img, ino, name, len, buf, cap);
	return op_finish(&op);
}

int x3_setxattr(x3_image *img, uint32_t ino, const char *name, uint32_t len, const void *value, uint64_t size, int flags)
{
	CHANGE (img)
		xattr_set(img, ino, name, len, value, size, flags, false);
	return op_finish(&op);
}

int x3_removexattr(x3_image *img, uint32_t ino, const char *name, uint32_t len)
{
	CHANGE (img)
		xattr_set(img, ino, name, len, NULL, 0, 0, true);
	return op_finish(&op);
}


/* --- durability --- */

int x3_commit(x3_image *img)
{
	int error = 0;

	image_lock(img);
	if (img->aborted)
		error = -EROFS;
	else if (!img->read_only)
		error = commit_until(img, img->tid);
	pthread_mutex_unlock(&img->lock);
	return error;
}

int x3_checkpoint(x3_image *img)
{
	int error = 0;

	image_lock(img);
	if (img->aborted)
		error = -EROFS;
	else if (!img->read_only)
		error = checkpoint_now(img);
	pthread_mutex_unlock(&img->lock);
	return error;
}

int x3_fsync(x3_image *img, uint32_t ino, int datasync)
{
	uint32_t tid = 0;
	bool in_place = false;
	int error = 0;

	if (img->read_only)
		return 0;
	image_lock(img);
	if (img->aborted) {
		error = -EROFS;
	} else {
		tid = (datasync ? img->lasting : img->changed)[ino % 4096];
		in_place = !tid_after(tid, img->committed);
		if (!in_place)
			error = commit_until(img, tid);
	}
	pthread_mutex_unlock(&img->lock);
	if (!in_place)
		return error;
	error = io_barrier(img);
	pthread_mutex_lock(&img->lock);
	if (error)
		abort_image(img, -error, "file data cannot be written: %s", strerror(-error));
	pthread_mutex_unlock(&img->lock);
	return error;
}

int x3_dirty(x3_image *img)
{
	int dirty;

	image_lock(img);
	dirty = img->ndirty && !img->aborted;
	pthread_mutex_unlock(&img->lock);
	return dirty;
}

int x3_switch(x3_image *img, int fd)
{
	int error = 0;

	image_lock(img);
	if (img->ndirty || img->committing || img->nlogged || img->jhead != img->jfirst)
		error = -EBUSY;
	else if (dup3(fd, img->fd, O_CLOEXEC) < 0) /* at once, whoever may be reading */
		error = -errno;
	pthread_mutex_unlock(&img->lock);
	return error;
}


void x3_begin(x3_image *img)
{
	image_lock(img);
	img->atoms++;
	pthread_mutex_unlock(&img->lock);
}

void x3_end(x3_image *img)
{
	pthread_mutex_lock(&img->lock);
	if (--img->atoms == 0)
		pthread_cond_broadcast(&img->wake);
	pthread_mutex_unlock(&img->lock);
}

/* Whether something is under way, or not yet home. */
static bool is_busy(const x3_image *img)
{
	return img->committing || img->busy || img->atoms || img->readers;
}

int x3_suspend(x3_image *img)
{
	int error = 0;

	image_lock(img);
	img->draining = true; /* who reads from now on, does it under the lock */
	do {
		while (is_busy(img))
			pthread_cond_wait(&img->wake, &img->lock);
		error = img->aborted ? -EIO : checkpoint_now(img); /* others go on meanwhile */
	} while (!error && (is_busy(img) || img->ndirty || img->nlogged));
	img->draining = false;
	if (!error) {
		error = journal_finish(img);
		if (error)
			abort_image(img, -error, "the filesystem cannot be marked clean: %s", strerror(-error));
	}
	img->suspended = !error;
	pthread_mutex_unlock(&img->lock);
	return error;
}

int x3_resume(x3_image *img, int fd)
{
	int error = fd >= 0 && dup3(fd, img->fd, O_CLOEXEC) < 0 ? -errno : 0;

	pthread_mutex_lock(&img->lock);
	img->resuming = true;
	img->resumer = pthread_self();
	pthread_mutex_unlock(&img->lock);
	unload(img); /* all others wait */
	error = error ? error : load(img);
	pthread_mutex_lock(&img->lock);
	if (error) {
		img->dead = true;
		abort_image(img, -error, NULL);
	}
	img->suspended = img->resuming = false;
	pthread_cond_broadcast(&img->wake);
	pthread_mutex_unlock(&img->lock);
	return error;
}


/* --- for tests --- */

int x3_mark(x3_image *img, uint64_t n)
{
	trace(img, X3_TRACE_MARK, n, NULL, 0);
	return 0;
}

int x3_inject(x3_image *img, int kind, int64_t nth, int error, int sticky)
{
	pthread_mutex_lock(&img->io_lock);
	img->inject_kind = nth ? kind : 0;
	img->inject_nth = nth;
	img->inject_error = error;
	img->inject_sticky = sticky;
	pthread_mutex_unlock(&img->io_lock);
	return 0;
}
