/* The headers of the messages between the kernel and the daemon: see linux/fuse.h. */
#ifndef COWFS_MESSAGES_H
#define COWFS_MESSAGES_H

#include <stdint.h>

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
