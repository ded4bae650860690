/* Whether the root directory has no access ACL: see root_acl.c. */
#ifndef COWFS_ROOT_ACL_H
#define COWFS_ROOT_ACL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* Reset for a new session: nothing is known. */
void root_acl_reset(void);

/* Examine a request, which may change the ACL or ask for it. */
void root_acl_received(const void *request, size_t size);

/* Examine a message to the kernel: the reply with the ACL, or a notice that it may have changed. */
void root_acl_sent(const struct iovec *iov, int count);

/* Whether a GETXATTR asks for the ACL and there is none. */
bool root_acl_is_none(uint64_t inode, const char *name);

#endif
