/*
 * The entry points of engine.h for inodes and their data. Those for names are in names.c, for durability in sync.c, for
 * opening and closing in open.c.
 */
#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>

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

/* Flags that the union must respect: see protect.py. */
#define FLAGS_RESPECTED (EXT2_IMMUTABLE_FL | EXT2_APPEND_FL | EXT2_SYNC_FL | EXT2_DIRSYNC_FL)

static bool is_plain(x3_image *img, uint32_t dir, const struct inode *in, const struct x3_attr *attr)
{
	const int64_t FIRST = INT64_C(-2147483648) * 1000000000; /* below it, the numbers mean times after 2262 */
	bool usual = attr->atime_ns >= FIRST && attr->mtime_ns >= FIRST && attr->ctime_ns >= FIRST;
	bool one_place = S_ISDIR(attr->mode) ? in->ino != EXT2_ROOT_INO && dir_parent(img, in->ino, NULL)->inode == dir
					     : (S_ISREG(attr->mode) || S_ISLNK(attr->mode)) && attr->nlink == 1;

	return usual && one_place && !(attr->flags & FLAGS_RESPECTED) && !xattr_any(img, in);
}

void x3_plain(x3_image *img, uint32_t dir, const uint32_t *inodes, uint32_t count, uint32_t *out)
{
	memset(out, 0, count * 2 * sizeof *out);
	for (uint32_t i = 0; i < count; i++) {
		if (!inodes[i])
			continue;
		QUERY (img) {
			struct inode in = inode_get(img, inodes[i]);
			struct x3_attr attr;
			inode_attr(img, &in, &attr);
			if (is_plain(img, dir, &in, &attr)) {
				out[2 * i] = attr.mode;
				out[2 * i + 1] = attr.generation;
			}
		}
		op_finish(&op);
	}
}

static void set_attributes(x3_image *img, uint32_t ino, uint32_t what, const struct x3_attr *attr)
{
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

int x3_setattr(x3_image *img, uint32_t ino, uint32_t what, const struct x3_attr *attr)
{
	CHANGE (img)
		set_attributes(img, ino, what, attr);
	return op_finish(&op);
}

static bool is_simple(x3_image *img, uint32_t ino)
{
	struct inode in = inode_get(img, ino);

	return S_ISREG(in.raw->i_mode) && in.raw->i_links_count == 1 && !(in.raw->i_mode & (S_ISUID | S_ISGID)) &&
	       !(in.raw->i_flags & FLAGS_RESPECTED) && !xattr_rules(img, &in);
}

int x3_is_simple(x3_image *img, uint32_t ino)
{
	QUERY (img)
		op.result = is_simple(img, ino);
	return op_finish(&op);
}

int x3_setattr_simple(x3_image *img, uint32_t ino, uint32_t what, struct x3_attr *attr)
{
	CHANGE (img) {
		if (!is_simple(img, ino))
			fail(img, EOPNOTSUPP, "inode %u is not simple", ino);
		set_attributes(img, ino, what, attr);
		struct inode in = inode_get(img, ino);
		inode_attr(img, &in, attr);
	}
	return op_finish(&op);
}

static int64_t atime_is_due(x3_image *img, uint32_t ino, int64_t now, bool always)
{
	QUERY (img) {
		struct inode in = inode_get(img, ino);
		op.result = inode_atime_is_due(img, &in, now, always);
	}
	return op_finish(&op);
}

int x3_was_read(x3_image *img, uint32_t ino, int always)
{
	int64_t now = now_ns(), due = img->read_only ? 0 : atime_is_due(img, ino, now, always);

	if (due <= 0)
		return due;
	CHANGE (img) {
		struct inode in = inode_change(img, ino, false);
		inode_times(img, &in, X3_ATIME, now);
	}
	return op_finish(&op);
}

int x3_setflags(x3_image *img, uint32_t ino, uint32_t flags)
{
	CHANGE (img) {
		struct inode in = inode_change(img, ino, true);
		inode_set_flags(img, &in, flags);
		inode_times(img, &in, CTIME, now_ns());
	}
	return op_finish(&op);
}

int x3_birth(x3_image *img, uint32_t ino, int64_t *ns)
{
	QUERY (img) {
		struct inode in = inode_get(img, ino);
		op.result = inode_birth(img, &in, ns);
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
			fail(img, EINVAL, "not a symlink");
		if (!size || size >= (inode_is_mapped(img, &in) ? min(img->bs, PATH_MAX) : sizeof in.raw->i_block))
			fail(img, EUCLEAN, "symlink %u is invalid", ino);
		if (size > cap)
			fail(img, ERANGE, "too small a buffer");
		if (inode_is_mapped(img, &in))
			target = dir_block(img, &in, 0)->data;
		size = strnlen(target, size); /* as in the kernel */
		memcpy(buf, target, size);
		op.result = size;
	}
	return op_finish(&op);
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

/* Make other threads wait before they write to a file, until the end of its truncation. Under the lock. */
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

int x3_punch(x3_image *img, uint32_t ino, uint64_t off, uint64_t len)
{
	int64_t result;

	for (;;) {
		CHANGE_DATA (img, ino)
			op.result = !data_punch(img, ino, off, len);
		result = op_finish(&op);
		if (result <= 0)
			return result;
		let_others();
	}
}

uint64_t x3_size_max(const x3_image *img)
{
	return img->size_max;
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

int x3_setxattr(x3_image *img, uint32_t ino, const char *name, uint32_t len, const void *value, uint64_t size,
		int flags)
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
	img->inject_holds = false;
	pthread_cond_broadcast(&img->inject_wake);
	pthread_mutex_unlock(&img->io_lock);
	return 0;
}
