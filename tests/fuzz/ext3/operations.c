/*
 * What programs do with an image, according to the rules for callers in engine.h.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <ext2fs/ext2_fs.h>

#include "fuzz.h"

#define MOST 100000u /* names read in a sound image: all */
#define SOME 250u    /* names read in a damaged image */
#define MANY 150u    /* names made or removed at a time */
#define TOGETHER_MAX 4

static bool is_sound(const struct world *w)
{
	return !w->damaged && !w->injected;
}

uint32_t pick(const struct world *w, uint32_t index)
{
	return w->known[index % w->nknown];
}

/* Make the name with this number. There are few names, so that they are used repeatedly; some are long. */
static uint32_t name_of(char name[300], uint32_t number)
{
	static const uint16_t lengths[] = { 0, 0, 0, 0, 12, 40, 120, 250, 255, 256 };
	uint32_t length = snprintf(name, 300, "%u", number % 997);
	uint32_t want = lengths[number / 1000 % 10];

	for (; length < want; length++)
		name[length] = "n\xff.e"[length % 4];
	return length;
}


/* --- opening and closing --- */

static bool open_image(struct world *w, uint32_t flags)
{
	int error;

	w->atoms = 0;
	w->injected = false;
	w->read_only = flags & X3_READ_ONLY;
	w->nkept = 0;
	error = x3_open(w->fd, flags, w->first.c % (1 << 20), -1, w->boot, &w->img);
	if (error)
		w->img = NULL;
	if (error && !w->damaged)
		finding("a sound image cannot be opened: %s: %s", strerror(-error), x3_message(NULL));
	if (error && error != -EINVAL && error != -EUCLEAN && error != -EOPNOTSUPP && error != -EBADMSG &&
	    error != -EIO)
		finding("opening says %s: %s", strerror(-error), x3_message(NULL));
	return !error;
}

/* If the environment variable COWFS_FUZZ_FSCK is N, run e2fsck on every Nth undamaged image after it is closed. */
static void ask_e2fsck(const struct world *w)
{
	static unsigned every, count;
	char command[200];
	int status;

	if (!every)
		every = getenv("COWFS_FUZZ_FSCK") ? atoi(getenv("COWFS_FUZZ_FSCK")) : UINT32_MAX;
	if (!every || ++count % every)
		return;
	snprintf(command, sizeof command, "said=$(e2fsck -fn /proc/%d/fd/%d 2>&1) || { echo \"$said\" >&2; exit 1; }",
		 getpid(), w->fd);
	status = system(command);
	if (!WIFEXITED(status) || WEXITSTATUS(status))
		finding("e2fsck is not content");
}

static void end_atom(struct world *w)
{
	if (w->atoms)
		x3_end(w->img);
	w->atoms = 0;
}

void close_image(struct world *w)
{
	int error;

	if (!w->img)
		return;
	end_atom(w);
	error = x3_close(w->img);
	w->img = NULL;
	check(w, error);
	if (!error && !w->damaged && !w->read_only)
		ask_e2fsck(w);
}

static void compare(const char *when, uint64_t before, uint64_t after)
{
	if (before != after)
		finding("the tree is another one %s", when);
}

/* Kill the process: all changes survive, and a read-only open shows them. Or crash the machine. */
static void crash(struct world *w, const struct record *r)
{
	bool sound, machine = r->a & 2;
	uint64_t before = 0;

	end_atom(w);
	sound = is_sound(w) && !machine && !w->read_only;
	if (sound)
		before = walk(w, MOST);
	x3_abandon(w->img);
	w->img = NULL;
	w->boot ^= machine ? X3_OTHER_BOOT : 0;
	if (r->a & 4)
		return; /* the next records may damage it before it is opened again */
	if (r->a & 1 && open_image(w, X3_READ_ONLY)) {
		uint64_t after = walk(w, sound ? MOST : SOME);
		if (sound)
			compare("after a crash, for who reads", before, after);
		close_image(w);
	}
	if (open_image(w, 0) && sound)
		compare("after a crash", before, walk(w, MOST));
}

/* Grow the last group, as resize2fs does. */
static void enlarge(struct world *w, uint32_t count)
{
	struct ext2_super_block *sb = (struct ext2_super_block *)(w->image + 1024);
	uint32_t blocks = sb->s_blocks_count, group = (blocks - sb->s_first_data_block - 1) / sb->s_blocks_per_group;
	uint32_t first = sb->s_first_data_block + group * sb->s_blocks_per_group, bs = w->base->block_size;
	struct ext2_group_desc *gd = (struct ext2_group_desc *)(w->image + w->base->region[GROUPS].piece[group].at);
	unsigned char *bitmap = w->image + (uint64_t)gd->bg_block_bitmap * bs;

	count = count % (first + sb->s_blocks_per_group - blocks + 1);
	if ((blocks + (uint64_t)count) * bs > w->base->size + ROOM_TO_GROW)
		return;
	world_resize(w, (blocks + (uint64_t)count) * bs);
	for (uint32_t i = blocks - first; i < blocks - first + count; i++)
		bitmap[i / 8] &= ~(1 << i % 8);
	gd->bg_free_blocks_count += count;
	sb->s_free_blocks_count += count;
	sb->s_blocks_count += count;
}

static void suspend(struct world *w, const struct record *r)
{
	bool sound, done;
	uint64_t before = 0;

	end_atom(w);
	sound = is_sound(w);
	if (sound)
		before = walk(w, MOST);
	done = check(w, x3_suspend(w->img)) >= 0;
	if (!done)
		return;
	if (sound && !w->read_only && r->a & 1)
		enlarge(w, r->c);
	if (check(w, x3_resume(w->img, r->a & 2 ? w->fd : -1)) < 0) {
		w->injected = true; /* every call fails from now on */
		if (sound)
			finding("a sound image cannot be opened again: %s", x3_message(w->img));
	} else if (sound) {
		compare("after it was let go", before, walk(w, MOST));
	}
}


/* --- names --- */

static uint32_t directory(struct world *w, uint32_t index)
{
	for (uint32_t i = 0; i < 4; i++) {
		uint32_t ino = pick(w, index + i);
		bool kept = false;
		for (uint32_t k = 0; k < w->nkept; k++)
			kept |= w->kept[k] == ino;
		if (!kept && is_directory(w, ino))
			return ino;
	}
	return 2;
}

static void list_some(struct world *w, const struct record *r)
{
	static struct name names[64];
	uint32_t dir = directory(w, r->b), n = list(w, dir, names, 64);
	struct x3_attr attr;

	for (uint32_t i = 0; i < n && i < 8; i++) {
		const struct name *name = &names[(r->c + i) % n];
		if (check(w, x3_child(w->img, dir, name->ino, &attr)) >= 0)
			know(w, name->ino);
	}
}

static void create(struct world *w, uint32_t dir, uint32_t number, const struct record *r)
{
	static const uint32_t types[] = { S_IFREG, S_IFREG, S_IFDIR, S_IFDIR, S_IFLNK, S_IFCHR, S_IFIFO, S_IFBLK };
	static char target[5000];
	struct x3_new new = {
		.mode = types[r->a % 8] | (r->d & 07777), .uid = r->d, .gid = r->d >> 8, .target = target
	};
	struct name found;
	char name[300];
	uint32_t length = name_of(name, number);

	if (find(w, dir, name, length, &found))
		return;
	if (S_ISLNK(new.mode)) {
		new.target_len = r->d % sizeof target;
		memset(target, 't', sizeof target);
	} else if (S_ISCHR(new.mode) || S_ISBLK(new.mode)) {
		new.major = r->d & 0xfff;
		new.minor = r->d >> 12;
	}
	if (check(w, x3_create(w->img, dir, name, length, r->e % 8 ? 0 : r->e >> 3, &new)) >= 0)
		know(w, new.ino);
}

static void create_many(struct world *w, const struct record *r)
{
	uint32_t dir = directory(w, r->b);
	struct record each = *r;

	for (uint32_t i = 0; i < r->c % MANY; i++) {
		each.d = r->d + i;
		create(w, dir, r->e + i, &each);
	}
}

static void remove_name(struct world *w, uint32_t dir, const struct name *name, bool keep)
{
	struct x3_attr attr;
	int64_t result;

	if (!attributes(w, name->ino, &attr))
		return;
	keep &= w->nkept < KEPT_MAX;
	result = check(w, (S_ISDIR(attr.mode) ? x3_rmdir : x3_unlink)(w->img, dir, name->name, name->length,
								      name->place, name->ino, keep));
	if (result == 1)
		w->kept[w->nkept++] = name->ino;
}

static void remove_some(struct world *w, const struct record *r, uint32_t count)
{
	static struct name names[MANY];
	uint32_t dir = directory(w, r->b), n = list(w, dir, names, MANY);

	for (uint32_t i = 0; i < n && i < count; i++)
		remove_name(w, dir, &names[(r->c + i) % n], r->a & 1);
}

static bool is_above(struct world *w, uint32_t ino, uint32_t dir)
{
	return is_directory(w, ino) && check(w, x3_is_above(w->img, ino, dir)) != 0;
}

static void rename_one(struct world *w, const struct record *r)
{
	static struct name names[64];
	struct x3_rename how = { .source_dir = directory(w, r->b),
				 .target_dir = directory(w, r->e),
				 .flags = r->a & 7 };
	uint32_t n = list(w, how.source_dir, names, 64), length;
	const struct name *source = &names[r->c % 64 % (n ? n : 1)];
	struct name target;
	char name[300];
	bool there;

	length = name_of(name, r->d);
	there = find(w, how.target_dir, name, length, &target);
	if (!n || (there && target.ino == source->ino) || is_above(w, source->ino, how.target_dir))
		return;
	if (how.flags & X3_EXCHANGE && (!there || is_above(w, target.ino, how.source_dir)))
		return;
	if (how.flags & X3_EXCHANGE)
		how.flags = X3_EXCHANGE;
	how.flags &= w->nkept < KEPT_MAX ? ~0u : ~(uint32_t)X3_KEEP;
	how.source_name = source->name;
	how.source_len = source->length;
	how.source_place = source->place;
	how.target_name = name;
	how.target_len = length;
	how.ino = source->ino;
	if (there) {
		how.target_place = target.place;
		how.replaced = target.ino;
	}
	if (check(w, x3_rename(w->img, &how)) == 1)
		w->kept[w->nkept++] = target.ino;
}

static void link_one(struct world *w, const struct record *r)
{
	uint32_t dir = directory(w, r->c), ino = pick(w, r->b), length;
	struct x3_place place;
	struct name found;
	char name[300];

	length = name_of(name, r->d);
	for (uint32_t i = 0; i < w->nkept; i++)
		if (w->kept[i] == ino || w->kept[i] == dir)
			return;
	if (!find(w, dir, name, length, &found))
		check(w, x3_link(w->img, ino, dir, name, length, 0, &place));
}

static void link_many(struct world *w, const struct record *r)
{
	struct record each = *r;

	for (uint32_t i = 0; i < r->c % MANY; i++) {
		each.c = r->e >> 16;
		each.d = 8000 + (r->e + i) % 997; /* long names: an index gets large */
		link_one(w, &each);
	}
}

static void release(struct world *w, const struct record *r)
{
	uint32_t i = w->nkept ? r->b % w->nkept : 0;

	if (!w->nkept)
		return;
	check(w, x3_release(w->img, w->kept[i]));
	w->kept[i] = w->kept[--w->nkept];
}


/* --- the rest --- */

static void look(struct world *w, const struct record *r)
{
	static char target[4096];
	uint32_t ino = pick(w, r->b), plain[2];

	check(w, x3_readlink(w->img, ino, target, r->c % (sizeof target + 1)));
	check(w, x3_parent(w->img, ino));
	x3_directory_is_synced(w->img, ino);
	x3_plain(w->img, pick(w, r->d), &ino, 1, plain);
	is_above(w, ino, pick(w, r->d));
}

static void inject(struct world *w, const struct record *r)
{
	static const int errors[] = { ENOSPC, EIO, EDQUOT, EIO };

	w->injected = true;
	x3_inject(w->img, 1 + r->a % 4, r->b % 30, errors[r->c % 4], r->d & 1);
}

/* Calls that wait for a commit: not between x3_begin() and x3_end(). */
static void durability(struct world *w, const struct record *r)
{
	end_atom(w);
	switch (what(r)) {
	case SYNC_ONE:
		check(w, x3_fsync(w->img, pick(w, r->b), r->a & 1));
		break;
	case COMMIT_ALL:
		if (x3_dirty(w->img) || x3_wait(w->img, 0))
			check(w, x3_commit(w->img));
		break;
	case CHECKPOINT:
		check(w, x3_checkpoint(w->img));
		break;
	case SWITCH:
		check(w, x3_checkpoint(w->img));
		check(w, x3_switch(w->img, w->fd));
		break;
	default:
		break;
	}
}

static void do_it(struct world *w, const struct record *r)
{
	switch (what(r)) {
	case LIST:
		return list_some(w, r);
	case CREATE:
		return create(w, directory(w, r->b), r->c, r);
	case CREATE_MANY:
		return create_many(w, r);
	case REMOVE:
		return remove_some(w, r, 1);
	case REMOVE_MANY:
		return remove_some(w, r, 1 + r->d % MANY);
	case RENAME:
		return rename_one(w, r);
	case LINK:
		return link_one(w, r);
	case LINK_MANY:
		return link_many(w, r);
	case LOOK:
		return look(w, r);
	case RELEASE:
		return release(w, r);
	case WALK:
		walk(w, SOME);
		return;
	case TOGETHER:
		x3_begin(w->img);
		w->atoms = 1;
		return;
	case INJECT:
		return inject(w, r);
	case CRASH:
		return crash(w, r);
	case CLOSE:
		return close_image(w);
	case SUSPEND:
		return suspend(w, r);
	case SYNC_ONE:
	case COMMIT_ALL:
	case CHECKPOINT:
	case SWITCH:
		return durability(w, r);
	default:
		return file_operation(w, r);
	}
}

/* Carry out a record on the open image. If it cannot be opened, do nothing. */
void operation(struct world *w, const struct record *r)
{
	if (w->atoms && (w->atoms++ > TOGETHER_MAX || what(r) == TOGETHER))
		end_atom(w);
	if (!w->img && !open_image(w, w->first.b & 7 ? 0 : X3_READ_ONLY))
		return;
	do_it(w, r);
}
