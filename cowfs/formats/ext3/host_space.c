/*
 * Room on the disk that the image is on: the image may be sparse, and the disk fill up.
 *
 * File data is written at once, so x3_write meets a full disk itself. Metadata comes to the journal and
 * then to its place later, when it is too late to refuse anything. So the journal gets its blocks when
 * the image is opened, and a metadata block when it is first changed; an operation that cannot have
 * that fails with ENOSPC. Blocks that are there already cost a system call of a microsecond.
 *
 * Some disks refuse a write all the same (a thin volume, copy-on-write, a quota that shrinks). If
 * nothing is lost by that the image is stalled: all is kept in memory, changes are refused, and the
 * same commit or checkpoint is done again, until it succeeds. After fdatasync has failed the kernel
 * forgets which pages of the file were not written. What the journal takes is still in memory then;
 * file data is read back (unsynced.c). If some is not there any more, the image is aborted, and what is
 * on disk is the last commit.
 *
 * ENOSPC, EDQUOT and EFBIG are a lack of room. EIO from fdatasync may be one (so says ext4 on a thin pool of
 * device-mapper, in Linux 6.1) or a disk that fails: as long as nothing is lost it costs nothing to try again. EIO from
 * anything else, and all other errors, are a disk that fails. Memory that is lacking (ENOMEM) is waited for as room is:
 * what a commit or checkpoint needs is asked for before anything is changed that could not be done again.
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

/* Where there is no fallocate: write zeros into the holes of a range, which may be smaller than our blocks. */
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
			break; /* done, or nobody knows of holes here */
		off = hole;
	}
	return error;
}

/* See to it that blocks have their room on the disk; what they hold stays. */
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

/* At the beginning: take the journal's room, unless there is room for everything by itself. */
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

/* Within an operation: a metadata block is about to be changed. */
void room_for(x3_image *img, struct block *b)
{
	int error;

	if (b->flags & HAS_ROOM || img->in_memory)
		return;
	error = take_room(img, b->nr, 1);
	if (room_is_lacking(error) && img->op->changing == GOES_ON)
		return; /* it must be completed; if the room is missed later the image is stalled */
	if (error)
		fail(img, -error, "no space on the disk for block %u: %s", b->nr, strerror(-error));
	b->flags |= HAS_ROOM;
}

/* What the file lacks of its blocks, and what its disk has free: bytes. Without the lock. */
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


/* --- when it was refused all the same --- */

bool room_is_lacking(int error)
{
	return error == -ENOSPC || error == -EDQUOT || error == -EFBIG;
}

/*
 * After a commit or checkpoint, as the one who does it: stall the image, abort it, or let it go on. Return what
 * the waiters are told.
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

/* Whether a change must be refused; tries what failed last time again, now and then. May give up the lock. */
bool room_refuses(x3_image *img, enum change_kind kind)
{
	if (!img->stalled || kind == GOES_ON || (img->excused && img->atoms))
		return false;
	if (!img->atoms && monotonic_ns() - img->tried_ns >= RETRY_NS)
		commit_until(img, img->tid);
	return img->stalled != 0;
}
