/*
 * The entry points for names: looking them up, making, removing and renaming them.
 */
#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "internal.h"


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

/* Change the number of subdirectories of a directory. EMLINK. */
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

static void set_attrs(x3_image *img, uint32_t ino, const char *attrs, uint64_t size)
{
	uint32_t length[2]; /* of name and value */

	if (!size)
		return; /* attrs is NULL */
	for (const char *p = attrs, *end = p + size; p < end; p += length[0] + (uint64_t)length[1]) {
		memcpy(length, p, sizeof length);
		p += sizeof length;
		xattr_set(img, ino, p, length[0], p + length[0], length[1], 0, false);
	}
}

int x3_create(x3_image *img, uint32_t dir, const char *name, uint32_t len, uint32_t hint, struct x3_new *n)
{
	CHANGE (img) {
		struct inode in = inode_make(img, dir, n);
		if (S_ISDIR(n->mode))
			add_links(img, dir, 1);
		n->place = dir_insert(img, dir, name, len, in.ino, n->mode, hint);
		n->ino = in.ino;
		set_attrs(img, in.ino, n->attrs, n->attrs_size);
		inode_attr(img, &in, &n->attr);
	}
	return op_finish(&op);
}

int x3_copy(x3_image *img, uint32_t dir, const char *name, uint32_t len, uint32_t hint, struct x3_copy *c)
{
	CHANGE (img) {
		struct x3_new new = { .mode = c->mode, .uid = c->uid, .gid = c->gid };
		struct inode parent = inode_get(img, dir), in;
		struct x3_attr before;
		inode_attr(img, &parent, &before);
		in = inode_make(img, dir, &new);
		inode_set_flags(img, &in, 0);
		c->ino = in.ino;
		if (S_ISDIR(c->mode))
			add_links(img, dir, 1);
		c->place = dir_insert(img, dir, name, len, in.ino, new.mode, hint);
		if (!c->data && c->size)
			data_truncate(img, c->ino, c->size);
		for (uint64_t done = 0; c->data && done < c->size;)
			done += data_write(img, c->ino, c->data + done, c->size - done, done, false);
		set_attrs(img, c->ino, c->attrs, c->attrs_size);
		in = inode_change(img, c->ino, true);
		inode_times(img, &in, X3_ATIME, c->atime_ns);
		inode_times(img, &in, X3_MTIME, c->mtime_ns);
		inode_times(img, &in, CTIME, now_ns());
		parent = inode_change(img, dir, true);
		inode_times(img, &parent, X3_MTIME, before.mtime_ns);
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

/* Free the rest of an orphan in several operations. e2fsck may have freed it while the image was suspended. */
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

/* End an operation that may have begun to free an inode; free the rest now or leave it to x3_wait(). */
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

/* Fail unless the inode has the type that the call expects. */
static struct inode want_type(x3_image *img, uint32_t ino, bool is_dir)
{
	struct inode in = inode_get(img, ino);

	if (!!S_ISDIR(in.raw->i_mode) != is_dir)
		fail(img, is_dir ? ENOTDIR : EISDIR, "of the wrong type");
	if (is_dir && !dir_is_empty(img, ino))
		fail(img, ENOTEMPTY, "not empty");
	return in;
}

static int remove_name(x3_image *img, uint32_t dir, const char *name, uint32_t len, struct x3_place where, uint32_t ino,
		       bool keep, bool is_dir)
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

int x3_rmdir(x3_image *img, uint32_t dir, const char *name, uint32_t len, struct x3_place where, uint32_t ino, int keep)
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

/* Give the target name to *ino*; return what happened to the inode that had it. */
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

/* Put a character device 0:0 at the source name. */
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
			/* Adding the new name may have moved the old one. */
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
