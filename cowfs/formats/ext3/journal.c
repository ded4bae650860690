/*
 * The journal: its blocks, its superblock, its begin and end, in the format of Linux (fs/jbd2, include/linux/jbd2.h),
 * big-endian. commit.c writes transactions to it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "internal.h"
#include "jbd.h"

#define JOURNAL_MAX (1u << 20) /* blocks: four times the largest journal that mke2fs makes */
#define TRANSACTION_MAX min(4096u, (64u << 20) >> img->bits) /* blocks, for a journal of any size */

/* Write the journal's superblock: the log, with the running transaction first, begins at *start*. */
int journal_write_super(x3_image *img, uint32_t start)
{
	struct journal_super *super = (struct journal_super *)img->jsb;
	int error;

	super->sequence = htonl(img->tid);
	super->start = htonl(start);
	super->compat = 0; /* no checksums */
	error = io_write1(img, img->jsb, sizeof img->jsb, (uint64_t)img->jmap[0] << img->bits);
	return error ? error : io_barrier(img);
}

/* Mark the journal as damaged: the kernel's recovery copies this mark to the filesystem. */
void journal_mark_damaged(x3_image *img)
{
	((struct journal_super *)img->jsb)->error = htonl(-EUCLEAN);
	io_write1(img, img->jsb, sizeof img->jsb, (uint64_t)img->jmap[0] << img->bits);
}

static int compare_numbers(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

/* Tell journal_has() the journal's blocks; fail if it has one twice. */
static void sort_blocks(x3_image *img)
{
	uint32_t *sorted = img->jmap, i = 1;

	while (i < img->jlen && sorted[i] > sorted[i - 1])
		i++;
	if (i < img->jlen) {
		sorted = malloc(img->jlen * sizeof *sorted);
		if (!sorted)
			fail(img, ENOMEM, "no memory");
		memcpy(sorted, img->jmap, img->jlen * sizeof *sorted);
		qsort(sorted, img->jlen, sizeof *sorted, compare_numbers);
	}
	img->jsorted = sorted;
	img->jblocks = img->jlen;
	for (i = 1; i < img->jlen; i++)
		if (sorted[i] == sorted[i - 1])
			fail(img, EBADMSG, "the journal has block %u twice", sorted[i]);
}

/* Whether any of the blocks belongs to the journal. */
bool journal_has(const x3_image *img, uint32_t nr, uint32_t count)
{
	uint32_t low = 0, high = img->jsorted ? img->jblocks : 0;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;
		if (img->jsorted[middle] < nr)
			low = middle + 1;
		else
			high = middle;
	}
	return img->jsorted && low < img->jblocks && img->jsorted[low] - nr < count;
}

/* Find the journal's blocks and read its superblock; -errno. Within an operation. */
int journal_load(x3_image *img)
{
	struct journal_super *super = (struct journal_super *)img->jsb;
	struct inode in = inode_at(img, img->sb->s_journal_inum);
	uint64_t blocks = inode_size_of(&in) >> img->bits;
	int error;

	if (!S_ISREG(in.raw->i_mode) || blocks < 1024 || blocks > min(img->blocks, JOURNAL_MAX))
		fail(img, EBADMSG, "the journal's inode is invalid");
	img->jlen = blocks;
	img->jmap = calloc(img->jlen, sizeof *img->jmap);
	if (!img->jmap)
		fail(img, ENOMEM, "no memory");
	for (uint32_t i = 0; i < img->jlen;) {
		struct extent e = data_map(img, &in, i, img->jlen - i);
		if (!e.nr)
			fail(img, EBADMSG, "the journal has a hole");
		for (uint32_t k = 0; k < e.count; k++)
			img->jmap[i++] = e.nr + k;
	}
	sort_blocks(img);
	error = io_read(img, img->jsb, sizeof img->jsb, (uint64_t)img->jmap[0] << img->bits);
	if (error)
		fail(img, -error, "the journal cannot be read");
	if (ntohl(super->header.type) == SUPERBLOCK_V1) /* it has no fields for features */
		memset(&super->compat, 0, sizeof img->jsb - offsetof(struct journal_super, compat));
	else if (ntohl(super->header.type) != SUPERBLOCK_V2)
		fail(img, EBADMSG, "the journal's superblock is invalid");
	if (ntohl(super->header.magic) != JBD_MAGIC || ntohl(super->block_size) != img->bs ||
	    ntohl(super->blocks) > img->jlen || ntohl(super->blocks) < 1024 || ntohl(super->first) == 0 ||
	    ntohl(super->first) > ntohl(super->blocks) - 512 ||
	    (super->start && ntohl(super->start) < ntohl(super->first)) || ntohl(super->start) >= ntohl(super->blocks))
		fail(img, EBADMSG, "the journal's superblock is invalid");
	if (ntohl(super->incompat) & ~INCOMPAT_REVOKE || super->ro_compat)
		fail(img, EOPNOTSUPP, "the journal has unknown features (%#x)", ntohl(super->incompat));
	img->has_errors |= super->error != 0;
	img->jlen = ntohl(super->blocks);
	redo_layout(img);
	img->jfirst = img->jhead = ntohl(super->first);
	img->dirty_max = min((img->jend - img->jfirst) / 4, TRANSACTION_MAX);
	return 0;
}

/* Everything in the log is home: begin a new log, with the next transaction number. */
int journal_empty(x3_image *img)
{
	img->tid = img->committed + 1;
	return journal_write_super(img, img->jfirst);
}

/* Write the filesystem's superblock home directly. The journal is empty. */
static int write_fs_super(x3_image *img)
{
	int error = io_write1(img, img->sb, sizeof *img->sb, 1024);

	return error ? error : io_barrier(img);
}

/*
 * Record on disk that the journal may contain transactions. Skip one transaction number, so that blocks of an old,
 * incomplete transaction in the log are not mistaken for new ones. First set the flag that recovery is needed (with an
 * empty journal, it does no harm), then write where the log begins: e2fsck ignores a log without the flag.
 */
int journal_start(x3_image *img)
{
	int error;

	img->tid = img->committed + 2;
	img->tid += !img->tid;
	img->committed = img->tid - 1;
	super_begin(img);
	error = write_fs_super(img);
	((struct journal_super *)img->jsb)->error = 0; /* the filesystem's superblock has it */
	return error ? error : journal_write_super(img, img->jfirst);
}

/* Everything is home: clear the flag that recovery is needed. */
int journal_finish(x3_image *img)
{
	int error = journal_write_super(img, 0);

	if (error)
		return error;
	img->sb->s_feature_incompat &= ~EXT3_FEATURE_INCOMPAT_RECOVER;
	img->sb->s_wtime = time(NULL);
	return write_fs_super(img);
}
