/* The messages between the kernel and the daemon, as far as they are used here: see linux/fuse.h, which lacks some of
 * this on Debian 12. */
#ifndef COWFS_MESSAGES_H
#define COWFS_MESSAGES_H

#include <stddef.h>
#include <stdint.h>

enum { /* enum fuse_opcode */
       FUSE_FORGET = 2,
       FUSE_GETATTR = 3,
       FUSE_SETATTR = 4,
       FUSE_OPEN = 14,
       FUSE_READ = 15,
       FUSE_WRITE = 16,
       FUSE_SETXATTR = 21,
       FUSE_GETXATTR = 22,
       FUSE_REMOVEXATTR = 24,
       FUSE_INIT = 26,
       FUSE_CREATE = 35,
       FUSE_INTERRUPT = 36,
       FUSE_IOCTL = 39,
       FUSE_BATCH_FORGET = 42,
       FUSE_FALLOCATE = 43,
       FUSE_COPY_FILE_RANGE = 47,
       FUSE_SYNCFS = 50,
       FUSE_TMPFILE = 51,
       FUSE_STATX = 52,
       FUSE_COPY_FILE_RANGE_64 = 53,
};

#define INIT_EXT (1u << 30) /* FUSE_INIT_EXT: FUSE_INIT and its reply have more flags */

struct in_header { /* struct fuse_in_header: of a request */
	uint32_t len, opcode;
	uint64_t unique, nodeid;
	uint32_t uid, gid, pid;
	uint16_t extlen, padding;
};

struct out_header { /* struct fuse_out_header: of a reply */
	uint32_t len;
	int32_t error;
	uint64_t unique;
};

#endif
