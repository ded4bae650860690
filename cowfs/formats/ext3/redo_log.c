/* Access to the blocks of the redo log, and its checksums. */
#include <fcntl.h>
#include <pthread.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>
#include <ext2fs/ext2fs.h>

#include "internal.h"
#include "redo_log.h"

#define REDO_MAX (8u << 20) /* bytes, for a journal of any size */

const char redo_magic[8] = "cowfsRDO";

/* Choose the journal's blocks for the redo log. */
void redo_layout(x3_image *img)
{
	uint32_t blocks = min(img->jlen / 4, max(REDO_MAX >> img->bits, 64u));

	img->jend = img->jlen - blocks;
	img->redo.blocks = blocks - 1;
}

/* Read or write within the journal, from byte *at* of its block *first* on. */
int redo_io(x3_image *img, uint32_t first, size_t at, char *buf, size_t len, bool to_write)
{
	while (len) {
		uint32_t i = first + (at >> img->bits), skip = at & (img->bs - 1), k = 1;
		while (((size_t)k << img->bits) < skip + len && img->jmap[i + k] == img->jmap[i] + k)
			k++;
		size_t n = min(len, ((size_t)k << img->bits) - skip);
		uint64_t off = ((uint64_t)img->jmap[i] << img->bits) + skip;
		int error = to_write ? io_write1(img, buf, n, off) : io_read_raw(img, buf, n, off);
		if (error)
			return error;
		buf += n, at += n, len -= n;
	}
	return 0;
}

/*
 * The ID of this boot of the machine; false: unknown. It is read when the first image is opened: a serving
 * daemon has no /proc any more.
 */
bool redo_boot(const x3_image *img, char boot[40])
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	static char known[40];
	bool good;

	pthread_mutex_lock(&lock);
	if (!known[0]) {
		int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
		if (fd < 0 || read(fd, known, 36) != 36)
			known[0] = 0;
		if (fd >= 0)
			close(fd);
	}
	good = known[0];
	memcpy(boot, known, sizeof known);
	pthread_mutex_unlock(&lock);
	if (img->debug & X3_OTHER_BOOT)
		boot[0] ^= 1;
	return good;
}

uint32_t redo_header_crc(const struct redo_header *h)
{
	return ext2fs_crc32c_le(~0u, (const unsigned char *)&h->mounted_at,
				sizeof *h - offsetof(struct redo_header, mounted_at));
}

uint32_t redo_start_crc(const x3_image *img, const struct start *s)
{
	uint32_t crc = ext2fs_crc32c_le(~0u, (const unsigned char *)&img->redo.session, sizeof img->redo.session);

	return ext2fs_crc32c_le(crc, (const unsigned char *)&s->tid, sizeof *s - offsetof(struct start, tid));
}

uint32_t redo_record_crc(const x3_image *img, uint32_t tid, uint32_t number, const struct record *r)
{
	struct {
		uint64_t session;
		uint32_t tid, number;
	} order = { img->redo.session, tid, number };
	uint32_t crc = ext2fs_crc32c_le(~0u, (const unsigned char *)&order, sizeof order);

	return ext2fs_crc32c_le(crc, (const unsigned char *)&r->length, r->length - offsetof(struct record, length));
}
