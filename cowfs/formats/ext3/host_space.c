/*
 * Space on the disk that contains the image: the image may be sparse, and the disk may become full.
 *
 * File data is written at once, so x3_write itself fails on a full disk. Metadata is written later, to the journal and
 * then home, when it is too late to refuse the change. So the journal's blocks are allocated when the image is opened,
 * and a metadata block when it is first changed; the operation fails with ENOSPC if that is not possible. For blocks
 * that are already allocated, this costs a system call of one microsecond.
 *
 * Some disks can still refuse a write (a thin volume, copy-on-write, a shrinking quota). If no data is lost, the image
 * is stalled: everything stays in memory, changes are refused, and the same commit or checkpoint is repeated until it
 * succeeds. After a failed fdatasync, the kernel no longer knows which pages of the file were not written. The
 * journal's blocks are still in the engine's memory; file data is read back (unsynced.c). If some of it is lost, the
 * image is aborted, and the disk has the state of the last commit.
 *
 * ENOSPC, EDQUOT and EFBIG mean a lack of space. EIO from fdatasync may mean that too (ext4 on a thin pool of
 * device-mapper, in Linux 6.1), or a failing disk. While no data is lost, trying again does no harm. EIO from other
 * calls, and all other errors, mean a failing disk. Lack of memory (ENOMEM) is handled like lack of space: a commit or
 * checkpoint allocates its memory before it changes anything that could not be repeated.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

#define TMPFS 0x01021994
#define NFS 0x6969
#define RETRY_NS (1 * NS)

static int64_t monotonic_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * NS + now.tv_nsec;
}

/* Without fallocate: write zeros into the holes of a range. The holes may be smaller than the image's blocks. */
static int fill_holes(x3_image *img, uint64_t off, uint64_t end)
{
	static const char zero[4096];
	int error = 0;

	while (off < end && !error) {
		off_t data = lseek(img->fd, off, SEEK_DATA), hole;
		uint64_t stop = data < 0 && errno == ENXIO ? end : data < 0 ? off : min((uint64_t)data, end);
		for (uint64_t n; off < stop && !error; off += n) {
			n = min(stop - off, sizeof zero);
			error = io_write1(img, zero, n, off);
		}
		hole = off < end ? lseek(img->fd, off, SEEK_HOLE) : -1;
		if (hole < 0)
			break; /* done, or the filesystem does not report holes */
		off = hole;
	}
	return error;
}

/* Allocate blocks on the disk; their content stays. */
static int take_room(x3_image *img, uint32_t nr, uint32_t count)
{
	uint64_t off = (uint64_t)nr << img->bits, len = (uint64_t)count << img->bits;
	int error = injected(img, X3_FALLOCATE);

	if (error)
		return error;
	if (!img->no_fallocate) {
		if (!fallocate(img->fd, FALLOC_FL_KEEP_SIZE, off, len))
			return 0;
		if (errno != EOPNOTSUPP && errno != ENOSYS)
			return -errno;
		img->no_fallocate = true;
	}
	return fill_holes(img, off, off + len);
}

/* At open: allocate the journal's blocks, unless the file is in memory. */
int room_start(x3_image *img)
{
	struct statfs disk;
	struct stat st;
	int error = 0;

	img->no_fallocate = false;
	img->edge[0].known = img->edge[1].known = false;
	if (fstatfs(img->fd, &disk))
		memset(&disk, 0, sizeof disk);
	img->unsure = disk.f_type != TMPFS || disk.f_blocks != 0;
	img->tells_early = disk.f_type == NFS || img->debug & X3_AS_NFS;
	for (size_t i = 0; i < img->cached; i++)
		img->all[i]->flags &= ~HAS_ROOM;
	img->in_memory = fstat(img->fd, &st) < 0 || !S_ISREG(st.st_mode) ||
			 (fstatfs(img->fd, &disk) == 0 && disk.f_type == TMPFS && disk.f_blocks == 0);
	give_back_start(img);
	if (img->in_memory)
		return 0;
	for (uint32_t i = 0, n; i < img->jlen && !error; i += n) {
		for (n = 1; i + n < img->jlen && img->jmap[i + n] == img->jmap[i] + n; n++)
			;
		error = take_room(img, img->jmap[i], n);
	}
	if (error)
		snprintf(img->message, sizeof img->message, "its disk has no space for the journal: %s",
			 strerror(-error));
	return error;
}

/* Within an operation: allocate a metadata block that is about to be changed. */
void room_for(x3_image *img, struct block *b)
{
	int error;

	if (b->flags & HAS_ROOM || img->in_memory)
		return;
	error = take_room(img, b->nr, 1);
	if (room_is_lacking(error) && img->op->changing == GOES_ON)
		return; /* the change must be completed; if space is missing later, the image is stalled */
	if (error)
		fail(img, -error, "no space on the disk for block %u: %s", b->nr, strerror(-error));
	b->flags |= HAS_ROOM;
}

/* The bytes of the file's holes, and the free bytes of its disk. Without the lock. */
void room_facts(const x3_image *img, struct x3_facts *out)
{
	struct statvfs disk;
	struct stat st;

	out->missing = 0;
	out->disk_free = UINT64_MAX;
	if (img->in_memory || img->read_only || fstat(img->fd, &st) || fstatvfs(img->fd, &disk))
		return;
	out->missing = max(st.st_size - st.st_blocks * 512, 0);
	out->disk_free = disk.f_bavail * disk.f_frsize; /* root may have a little more */
}


/* --- after a refused write --- */

bool room_is_lacking(int error)
{
	return error == -ENOSPC || error == -EDQUOT || error == -EFBIG;
}

/*
 * After a commit or checkpoint, in the thread that did it: stall the image, abort it, or let it continue. Return the
 * result for the waiting threads.
 */
int room_judge(x3_image *img, int error)
{
	bool late = unsynced_judge(img);

	if (late && !error)
		error = img->failure;
	if (!error && img->data_lost)
		error = -EIO;
	if (!error) {
		img->stalled = 0;
		return 0;
	}
	if ((room_is_lacking(error) || error == -ENOMEM || (late && error == -EIO)) && !img->data_lost) {
		if (!img->stalled && !img->aborted)
			snprintf(img->message, sizeof img->message, "%s", strerror(-error));
		img->excused |= !img->stalled && img->atoms;
		img->stalled = -error;
		img->tried_ns = monotonic_ns();
		return error;
	}
	abort_image(img, -error,
		    img->data_lost ? "the disk has refused file data: %s; it is no longer in memory"
				   : "the journal cannot be written: %s",
		    strerror(-error));
	return -EIO;
}

/* Whether a change must be refused. Now and then, repeats the commit that failed. May drop the lock. */
bool room_refuses(x3_image *img, enum change_kind kind)
{
	if (!img->stalled || kind == GOES_ON || (img->excused && img->atoms))
		return false;
	if (!img->atoms && monotonic_ns() - img->tried_ns >= RETRY_NS)
		commit_until(img, img->tid);
	return img->stalled != 0;
}
