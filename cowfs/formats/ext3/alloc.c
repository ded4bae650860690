/*
 * Allocation of blocks and inodes.
 *
 * On disk (and in the cached bitmaps) a freed block is free at once, but it must not be reused before the
 * change is durable, nor before the checkpoint if the log still has the block. For each group with such
 * blocks img->hold has a second bitmap.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "internal.h"


/* --- groups --- */

struct ext2_group_desc *group_get(x3_image *img, uint32_t group)
{
	uint32_t per_block = img->bs / sizeof(struct ext2_group_desc);

	return (struct ext2_group_desc *)img->gd_block[group / per_block]->data + group % per_block;
}

static struct ext2_group_desc *group_change(x3_image *img, uint32_t group)
{
	uint32_t per_block = img->bs / sizeof(struct ext2_group_desc);

	return block_change(img, img->gd_block[group / per_block], group % per_block * sizeof(struct ext2_group_desc),
			    sizeof(struct ext2_group_desc));
}

static uint32_t group_start(const x3_image *img, uint32_t group)
{
	return img->first_block + group * img->blocks_per_group;
}

/* The number of blocks in a group: the last one may be shorter. */
static uint32_t group_blocks(const x3_image *img, uint32_t group)
{
	return min(img->blocks_per_group, img->blocks - group_start(img, group));
}

static bool overlaps(uint32_t a, uint32_t a_count, uint32_t b, uint32_t b_count)
{
	return a < b + b_count && b < a + a_count;
}

/*
 * Fail if any of the blocks is outside the filesystem, or contains metadata of the filesystem, as in
 * ext4_setup_system_zone().
 */
void check_block(x3_image *img, uint32_t nr, uint32_t count)
{
	bool good = nr >= img->first_block + 1 && nr < img->blocks && count <= img->blocks - nr;

	for (uint32_t g = (nr - img->first_block) / img->blocks_per_group;
	     good && g <= (nr + count - 1 - img->first_block) / img->blocks_per_group; g++) {
		const struct ext2_group_desc *gd = group_get(img, g);
		uint32_t table = (img->inodes_per_group * img->inode_size + img->bs - 1) >> img->bits;
		good = !overlaps(nr, count, gd->bg_inode_table, table) &&
		       !overlaps(nr, count, gd->bg_block_bitmap, 1) && !overlaps(nr, count, gd->bg_inode_bitmap, 1) &&
		       !overlaps(nr, count, group_start(img, g), group_copies(img, g));
	}
	good = good && !journal_has(img, nr, count);
	if (!good)
		fail(img, EUCLEAN, "block %u cannot belong to a file", nr);
}


/* --- bits --- */

static bool bit_get(const char *bitmap, uint32_t i)
{
	return bitmap[i / 8] >> i % 8 & 1;
}

static void bits_set(char *bitmap, uint32_t from, uint32_t count, bool value)
{
	for (uint32_t i = from; i < from + count;) {
		if (i % 8 == 0 && i + 8 <= from + count) {
			uint32_t bytes = (from + count - i) / 8;
			memset(bitmap + i / 8, value ? 0xff : 0, bytes);
			i += bytes * 8;
			continue;
		}
		if (value)
			bitmap[i / 8] |= 1 << i % 8;
		else
			bitmap[i / 8] &= ~(1 << i % 8);
		i++;
	}
}

/* The first bit from *i* on, below *end*, that is *value* in a (or, if there is one, in either of two); or *end*. */
static uint32_t bit_find(const char *a, const char *b, uint32_t i, uint32_t end, bool value)
{
	while (i < end) {
		uint64_t x, y = 0;
		memcpy(&x, a + i / 64 * 8, 8);
		if (b)
			memcpy(&y, b + i / 64 * 8, 8);
		x = ((x | y) ^ (value ? 0 : ~0ULL)) >> i % 64;
		if (x)
			return min(i + (uint32_t)__builtin_ctzll(x), end);
		i = (i / 64 + 1) * 64;
	}
	return end;
}


/* --- blocks --- */

/*
 * Whether the bitmap marks it as freed; false if the bitmap is not in the cache (nothing was freed there
 * lately).
 */
bool block_is_free(x3_image *img, uint32_t nr)
{
	uint32_t group = (nr - img->first_block) / img->blocks_per_group;
	struct block *bitmap;

	if (nr < img->first_block)
		return false;
	bitmap = block_find(img, group_get(img, group)->bg_block_bitmap);
	return bitmap && !bit_get(bitmap->data, nr - group_start(img, group));
}

/* Mark blocks of one group as used or free, in the bitmap and the counts. */
static void mark_blocks(x3_image *img, uint32_t group, uint32_t from, uint32_t count, bool used)
{
	struct block *bitmap = block_get(img, group_get(img, group)->bg_block_bitmap);
	uint32_t byte = from / 8, bytes = (from + count - 1) / 8 - byte + 1;

	if (!used && bit_find(bitmap->data, NULL, from, from + count, false) < from + count)
		fail(img, EUCLEAN, "blocks near %u are freed twice", group_start(img, group) + from);
	block_change(img, bitmap, byte, bytes);
	bits_set(bitmap->data, from, count, used);
	group_change(img, group)->bg_free_blocks_count += used ? -count : count;
	super_count(img, used ? -count : count, 0);
}

/* Find up to *want* free blocks in a row in one group, between two bits. Return how many. */
static uint32_t find_in_group(x3_image *img, uint32_t group, uint32_t from, uint32_t end, uint32_t want,
			      uint32_t *found)
{
	const struct block *bitmap = block_get(img, group_get(img, group)->bg_block_bitmap);
	const char *hold = img->hold[group];

	*found = bit_find(bitmap->data, hold, from, end, false);
	if (*found == end)
		return 0;
	return bit_find(bitmap->data, hold, *found, min(end, *found + want), true) - *found;
}

/*
 * Allocate up to *want* adjacent blocks, as close behind *goal* as possible. Return the first; 0 if the
 * filesystem is full.
 */
uint32_t alloc_blocks(x3_image *img, uint32_t goal, uint32_t want, uint32_t *got)
{
	uint32_t first, at, group, end;

	if (goal < img->first_block || goal >= img->blocks)
		goal = img->first_block;
	first = (goal - img->first_block) / img->blocks_per_group;
	for (uint32_t i = 0; i <= img->groups && img->sb->s_free_blocks_count; i++) {
		group = (first + i) % img->groups;
		if (!group_get(img, group)->bg_free_blocks_count)
			continue;
		/* The first group is visited twice: first behind the goal, at the end before it. */
		at = i == 0 ? goal - group_start(img, group) : 0;
		end = group_blocks(img, group);
		if (i == img->groups)
			end = min(end, goal - group_start(img, group));
		*got = find_in_group(img, group, at, end, min(want, group_get(img, group)->bg_free_blocks_count), &at);
		if (*got) {
			check_block(img, group_start(img, group) + at, *got);
			mark_blocks(img, group, at, *got, true);
			return group_start(img, group) + at;
		}
	}
	img->op->starved = img->nheld > 0 || img->ndoomed > 0;
	return 0;
}

/* Allocate one block; ENOSPC. */
uint32_t alloc_block(x3_image *img, uint32_t goal)
{
	uint32_t got, nr = alloc_blocks(img, goal, 1, &got);

	if (!nr)
		fail(img, ENOSPC, "full");
	return nr;
}


/* --- blocks that are held back --- */

/* Hold back *n* blocks of one group, or release them. */
static void hold(x3_image *img, struct run run, bool held)
{
	uint32_t group = (run.start - img->first_block) / img->blocks_per_group;

	bits_set(img->hold[group], run.start - group_start(img, group), run.count, held);
	img->nheld += held ? run.count : -(uint64_t)run.count;
}

static void runs_push(x3_image *img, struct runs *runs, struct run run, size_t apart)
{
	struct run *last = runs->n > apart ? &runs->run[runs->n - 1] : NULL;

	/* Runs do not cross groups: hold() relies on it. */
	if (last && last->start + last->count == run.start && (run.start - img->first_block) % img->blocks_per_group) {
		last->count += run.count;
		return;
	}
	runs->run = grow(img, runs->run, &runs->cap, runs->n + 1, sizeof *runs->run);
	runs->run[runs->n++] = run;
}

/* Undo the frees since there were *n* runs. */
void held_undo(x3_image *img, size_t n)
{
	while (img->held.n > n) {
		img->held_now -= img->held.run[--img->held.n].count;
		hold(img, img->held.run[img->held.n], false);
	}
}

static int compare_numbers(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

/* The numbers of the blocks in the log, in order: all of them, or those within *runs*; NULL: no memory. */
static uint32_t *logged_numbers(x3_image *img, const struct runs *runs, size_t *n)
{
	uint32_t *numbers = malloc((img->nlogged + 1) * sizeof *numbers);
	uint64_t blocks = 0;

	*n = 0;
	for (size_t i = 0; i < runs->n; i++)
		blocks += runs->run[i].count;
	for (size_t i = 0; numbers && blocks < img->nlogged && i < runs->n; i++) {
		for (uint32_t k = 0; k < runs->run[i].count; k++) {
			const struct block *b = block_find(img, runs->run[i].start + k);
			if (b && b->flags & LOGGED)
				numbers[(*n)++] = b->nr;
		}
	}
	for (size_t i = 0; numbers && blocks >= img->nlogged && i < img->nlogged; i++)
		if (img->logged[i]->flags & LOGGED)
			numbers[(*n)++] = img->logged[i]->nr;
	if (numbers)
		qsort(numbers, *n, sizeof *numbers, compare_numbers);
	return numbers;
}

/* How many of *n* sorted numbers are less than *nr*. */
static size_t count_below(const uint32_t *numbers, size_t n, uint32_t nr)
{
	size_t low = 0;

	while (low < n) {
		size_t middle = low + (n - low) / 2;
		if (numbers[middle] < nr)
			low = middle + 1;
		else
			n = middle;
	}
	return low;
}

/* Release a run, except the blocks that the log has: those wait for the checkpoint. */
static void release_run(x3_image *img, struct run run, const uint32_t *logged, size_t n)
{
	struct runs *later = &img->held_logged;

	for (size_t i = count_below(logged, n, run.start); i < n && logged[i] - run.start < run.count; i++) {
		uint32_t k = logged[i] - run.start;
		struct run *more = try_grow(later->run, &later->cap, later->n + 1, sizeof *more);
		if (!more) /* no memory to record it: the rest waits for ever */
			return;
		later->run = more;
		later->run[later->n++] = (struct run){ logged[i], 1 };
		if (k)
			hold(img, (struct run){ run.start, k }, false);
		run.start += k + 1;
		run.count -= k + 1;
	}
	if (run.count)
		hold(img, run, false);
}

/* Release blocks, except (unless *logged_too*) those that are in the log. */
void held_release(x3_image *img, struct runs *runs, bool logged_too)
{
	size_t n = 0;
	uint32_t *logged = runs->n && !logged_too ? logged_numbers(img, runs, &n) : NULL;

	for (size_t i = 0; i < runs->n && (logged || logged_too); i++) /* no memory: they wait for ever */
		release_run(img, runs->run[i], logged, n);
	free(logged);
	runs->n = 0;
	if (runs != &img->held_logged) {
		free(runs->run);
		*runs = (struct runs){ 0 };
	}
}

/* Free blocks: they can be reused when that is durable. */
void free_blocks(x3_image *img, uint32_t nr, uint32_t count)
{
	check_block(img, nr, count);
	while (count) {
		uint32_t group = (nr - img->first_block) / img->blocks_per_group;
		uint32_t from = nr - group_start(img, group), n = min(count, group_blocks(img, group) - from);
		mark_blocks(img, group, from, n, false);
		if (!img->hold[group] && !(img->hold[group] = calloc(1, img->bs)))
			fail(img, ENOMEM, "no memory");
		if (!(img->debug & X3_NO_HOLD)) {
			runs_push(img, &img->held, (struct run){ nr, n }, img->op->held_before);
			hold(img, (struct run){ nr, n }, true);
			img->held_now += n;
		}
		nr += n;
		count -= n;
	}
}


/* --- inodes --- */

/* Where to look for blocks of an inode first: in its group. */
uint32_t inode_goal(x3_image *img, uint32_t ino)
{
	return group_start(img, min((ino - 1) / img->inodes_per_group, img->groups - 1));
}

/*
 * The group for a new inode: its parent's; for directories one with free space.
 *
 * Directories in the root are spread over the groups, as the kernel does.
 */
static uint32_t choose_group(x3_image *img, uint32_t dir, bool is_dir)
{
	uint32_t parent = (dir - 1) / img->inodes_per_group, best = parent;

	if (!is_dir)
		return parent;
	for (uint32_t i = 0; i < img->groups; i++) {
		uint32_t g = (parent + i) % img->groups;
		const struct ext2_group_desc *gd = group_get(img, g), *other = group_get(img, best);
		if (dir != EXT2_ROOT_INO && gd->bg_free_inodes_count >= img->sb->s_free_inodes_count / img->groups &&
		    gd->bg_free_blocks_count >= img->sb->s_free_blocks_count / img->groups)
			return g;
		if (gd->bg_free_inodes_count && gd->bg_free_blocks_count > other->bg_free_blocks_count)
			best = g;
	}
	return best;
}

static void mark_inode(x3_image *img, uint32_t ino, bool is_dir, bool used)
{
	uint32_t group = (ino - 1) / img->inodes_per_group, bit = (ino - 1) % img->inodes_per_group;
	struct block *bitmap = block_get(img, group_get(img, group)->bg_inode_bitmap);
	struct ext2_group_desc *gd;

	if (bit_get(bitmap->data, bit) == used)
		fail(img, EUCLEAN, "inode %u is freed twice", ino);
	block_change(img, bitmap, bit / 8, 1);
	bits_set(bitmap->data, bit, 1, used);
	gd = group_change(img, group);
	gd->bg_free_inodes_count += used ? -1 : 1;
	if (is_dir)
		gd->bg_used_dirs_count += used ? 1 : -1;
	super_count(img, 0, used ? -1 : 1);
}

/* Allocate an inode number, near its directory. ENOSPC. */
uint32_t alloc_inode(x3_image *img, uint32_t dir, bool is_dir)
{
	uint32_t first = choose_group(img, dir, is_dir);

	for (uint32_t i = 0; i < img->groups; i++) {
		uint32_t group = (first + i) % img->groups;
		const struct ext2_group_desc *gd = group_get(img, group);
		if (!gd->bg_free_inodes_count)
			continue;
		uint32_t bit = bit_find(block_get(img, gd->bg_inode_bitmap)->data, NULL, 0, img->inodes_per_group,
					false);
		uint32_t ino = group * img->inodes_per_group + bit + 1;
		if (bit == img->inodes_per_group)
			continue;
		if (ino < img->first_ino)
			fail(img, EUCLEAN, "reserved inode %u is marked free", ino);
		mark_inode(img, ino, is_dir, true);
		return ino;
	}
	img->op->starved = img->ndoomed > 0;
	fail(img, ENOSPC, "no free inode is left");
}

void free_inode(x3_image *img, uint32_t ino, bool is_dir)
{
	mark_inode(img, ino, is_dir, false);
}
