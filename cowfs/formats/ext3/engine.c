/*
 * The entry points that engine.h promises; those of opening and closing are in open.c.
 */
#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "internal.h"

int x3_facts(x3_image *img, struct x3_facts *out)
{
	struct x3_facts room;

	room_facts(img, &room);
	QUERY (img) {
		*out = img->opened;
		out->missing = room.missing;
		out->disk_free = room.disk_free;
		out->stalled = img->stalled;
		out->unsaved = img->ndirty + img->nlogging + (img->read_only ? 0 : img->patches.n);
		out->saved_ns = img->saved_ns;
		out->block_size = img->bs;
		out->inode_size = img->inode_size;
		out->blocks = img->blocks;
		out->free_blocks = img->sb->s_free_blocks_count + img->doomed_blocks;
		out->reserved = img->sb->s_r_blocks_count;
		out->overhead = img->overhead;
		out->inodes = img->inodes;
		out->free_inodes = img->sb->s_free_inodes_count + img->ndoomed;
		out->journal_blocks = img->jlen;
		out->journal_used = img->jhead - img->jfirst;
		out->tid = img->tid;
		out->committed = img->committed;
		out->aborted = img->aborted;
		out->dirty = img->ndirty;
		out->cached = img->cached;
		out->held = img->nheld;
		out->cache_hits = img->hits;
		out->cache_misses = img->misses;
		out->commits = img->commits;
		out->checkpoints = img->checkpoints;
		out->replayed = img->replayed;
		out->redone = img->redone;
		out->barriers = __atomic_load_n(&img->barriers, __ATOMIC_RELAXED);
		out->bytes_written = __atomic_load_n(&img->bytes_written, __ATOMIC_RELAXED);
	}
	return op_finish(&op);
}


uint32_t x3_lost(x3_image *img, uint32_t *inodes, uint32_t room)
{
	uint32_t n;

	image_lock(img);
	n = min(img->nlost, room);
	memcpy(inodes, img->lost, n * sizeof *inodes);
	pthread_mutex_unlock(&img->lock);
	return n;
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

int x3_child(x3_image *img, uint32_t dir, uint32_t ino, struct x3_attr *out)
{
	QUERY (img) {
		struct inode in = inode_get(img, ino);
		inode_attr(img, &in, out);
		if (S_ISDIR(in.raw->i_mode) && (ino == EXT2_ROOT_INO || dir_parent(img, ino, NULL)->inode != dir))
			fail(img, EUCLEAN, "directory %u is in two places, or in the wrong one: %u", ino, dir);
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
		if (!size || size >= (inode_is_mapped(img, &in) ? min(img->bs, PATH_MAX) : sizeof in.raw->i_block))
			fail(img, EUCLEAN, "symlink %u makes no sense", ino);
		if (size > cap)
			fail(img, ERANGE, "too small a buffer");
		if (inode_is_mapped(img, &in))
			target = dir_block(img, &in, 0)->data;
		size = strnlen(target, size); /* as the kernel has it */
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

int x3_lookup(x3_image *img, uint32_t dir, const char *name, uint32_t len, struct x3_found *out)
{
	QUERY (img)
		op.result = dir_lookup(img, dir, name, len, out);
	return op_finish(&op);
}

int64_t x3_parent(x3_image *img, uint32_t dir)
{
	QUERY (img)
		op.result = dir_parent(img, dir, NULL)->inode;
	return op_finish(&op);
}

int x3_is_above(x3_image *img, uint32_t ino, uint32_t dir)
{
	QUERY (img)
		op.result = dir_is_above(img, ino, dir);
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

/* Free what is left of an orphan, operation by operation; e2fsck may have done it while we were suspended. */
static int delete_rest(x3_image *img, uint32_t ino)
{
	int64_t result;

	do {
		GO_ON (img)
			op.result = !inode_delete_some(img, ino, true);
		result = op_finish(&op);
	} while (result > 0);
	return result == -ESTALE ? 0 : result;
}

/* End an operation that may have begun to free an inode: see to the rest, or leave it to who calls x3_wait(). */
static int64_t finish_removal(struct op *op, uint32_t ino)
{
	x3_image *img = op->img;
	bool rest = !op->error && op->result == HAS_REST;
	int64_t result;

	if (rest && img->attended) {
		doom(img, ino, op->rest);
		op->result = rest = false;
	}
	result = op_finish(op);
	return rest ? delete_rest(img, ino) : result;
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
	CHANGE (img) {
		struct inode in = inode_get(img, dir);
		struct x3_place found = dir_find(img, &in, name, len, where, ino);
		want_type(img, ino, is_dir);
		dir_remove(img, dir, found);
		if (is_dir)
			add_links(img, dir, -1);
		op.result = inode_drop_link(img, ino, keep);
	}
	return finish_removal(&op, ino);
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
	GO_ON (img) {
		if (inode_get(img, ino).raw->i_links_count == 0)
			op.result = inode_delete_some(img, ino, true) ? LIVES : HAS_REST;
	}
	return finish_removal(&op, ino);
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
	return finish_removal(&op, how->replaced);
}


/* --- data --- */

static int64_t write_some(x3_image *img, uint32_t ino, const char *buf, uint64_t len, uint64_t off, bool holes)
{
	CHANGE_DATA (img, ino)
		op.result = data_write(img, ino, buf, len, off, holes);
	return op_finish(&op);
}

static int64_t write_all(x3_image *img, uint32_t ino, const char *buf, uint64_t len, uint64_t off, bool holes)
{
	uint64_t done = 0;

	while (done < len) {
		int64_t n = write_some(img, ino, buf + done, len - done, off + done, holes);
		if (n < 0)
			return done && n != -EIO && n != -EUCLEAN ? (int64_t)done : n;
		done += n;
	}
	return done;
}

int64_t x3_write(x3_image *img, uint32_t ino, const void *buf, uint64_t len, uint64_t off)
{
	return write_all(img, ino, buf, len, off, false);
}

int64_t x3_fill(x3_image *img, uint32_t ino, const void *buf, uint64_t len, uint64_t off)
{
	return write_all(img, ino, buf, len, off, true);
}

/* Let nobody write to a file until the end of its truncation; under the lock. */
static void truncation_begin(x3_image *img, struct truncation *t)
{
	t->next = img->truncations;
	img->truncations = t;
}

static void truncation_end(x3_image *img, struct truncation *t)
{
	for (struct truncation **link = &img->truncations; *link; link = &(*link)->next) {
		if (*link == t) {
			*link = t->next;
			pthread_cond_broadcast(&img->wake);
			return;
		}
	}
}

int x3_truncate(x3_image *img, uint32_t ino, uint64_t size)
{
	struct truncation rest = { .ino = ino };
	int64_t result;

	CHANGE_DATA (img, ino) {
		op.result = !data_truncate(img, ino, size);
		if (op.result)
			truncation_begin(img, &rest);
	}
	if (op.error)
		truncation_end(img, &rest);
	result = op_finish(&op);
	if (result <= 0)
		return result;
	do {
		let_others();
		GO_ON (img)
			op.result = !data_truncate_more(img, ino);
		result = op_finish(&op);
	} while (result > 0);
	pthread_mutex_lock(&img->lock);
	truncation_end(img, &rest);
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
	uint32_t tid;
	uint64_t failures;
	int error;

	if (img->read_only)
		return 0;
	do {
		image_lock(img);
		tid = (datasync ? img->lasting : img->changed)[ino % 4096];
		if (img->aborted || img->stalled || tid_after(tid, img->committed)) {
			error = img->aborted ? -EROFS : commit_until(img, tid);
			pthread_mutex_unlock(&img->lock);
			return error;
		}
		failures = io_failures(img);
		pthread_mutex_unlock(&img->lock);
		error = io_barrier(img);
	} while (!error && failures != io_failures(img)); /* another barrier was told what was meant for us */
	if (!error)
		return 0;
	pthread_mutex_lock(&img->lock);
	error = committing_begin(img) ? committing_end(img, error) : -EIO;
	pthread_mutex_unlock(&img->lock);
	return error;
}

int x3_dirty(x3_image *img)
{
	int dirty;

	image_lock(img);
	dirty = (img->ndirty || img->stalled) && !img->aborted;
	pthread_mutex_unlock(&img->lock);
	return dirty;
}

static bool is_past(const struct timespec *when)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec > when->tv_sec || (now.tv_sec == when->tv_sec && now.tv_nsec >= when->tv_nsec);
}

int x3_wait(x3_image *img, int64_t ms)
{
	struct timespec until;
	int result;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += ms / 1000;
	until.tv_nsec += ms % 1000 * 1000000;
	until.tv_sec += until.tv_nsec / NS;
	until.tv_nsec %= NS;
	pthread_mutex_lock(&img->lock);
	img->attended = !img->woken;
	while (!img->woken && (img->due != img->tid || img->aborted)) {
		if (img->ndoomed && !img->aborted && !img->stalled && !is_suspended(img)) {
			pthread_mutex_unlock(&img->lock);
			doomed_free_some(img);
			let_others();
			pthread_mutex_lock(&img->lock);
			if (is_past(&until))
				break;
		} else if (pthread_cond_timedwait(&img->wake, &img->lock, &until) == ETIMEDOUT) {
			break;
		}
	}
	img->woken = false;
	img->due = 0;
	result = (img->ndirty || img->stalled) && !img->aborted;
	pthread_mutex_unlock(&img->lock);
	return result;
}

void x3_wake(x3_image *img)
{
	pthread_mutex_lock(&img->lock);
	img->woken = true;
	img->attended = false;
	pthread_cond_broadcast(&img->wake);
	pthread_mutex_unlock(&img->lock);
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
	if (--img->atoms == 0) {
		img->excused = false;
		redo_flush(img);
		pthread_cond_broadcast(&img->wake);
		if (redo_is_lost(img) && !img->stalled)
			commit_until(img, img->redo.lost_tid);
	}
	pthread_mutex_unlock(&img->lock);
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
