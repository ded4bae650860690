/*
 * Reads and writes an ext3 filesystem in a file, in this process. The filesystem's journal makes it crash-safe.
 *
 * Every function takes the image's lock and may be called from any thread. Unless noted, it blocks, and returns 0 or
 * more if it succeeds and -errno if it fails. Names are bytes without a terminating NUL. The caller knows the names of
 * a directory (x3_readdir): no function checks whether a name exists already, or whether a directory is moved below
 * itself.
 *
 * A function that makes a change is one atomic operation. If it fails, nothing has changed (except that x3_write may
 * have written a part, and returns how much). After a crash, changes are either complete or absent, in the order of
 * the calls. Each change can fail with ENOSPC; ENOMEM; EROFS if the image was opened read-only or is aborted; EIO; and
 * EUCLEAN, if the image is damaged. EIO and EUCLEAN abort the image, as errors=remount-ro does: nothing more is
 * written except the mark of the damage, reads continue from memory, and x3_facts and x3_message report it. EUCLEAN
 * from a function that only reads does not abort the image.
 *
 * If the disk that contains the image is full (ENOSPC, EDQUOT, EFBIG), operations that need a block there fail with
 * that errno. If a commit fails for lack of space, which is rare (see host_space.c), or if fdatasync fails, even with
 * EIO, the image is stalled: changes made so far stay in memory, and further changes, and calls that wait for the disk,
 * fail with that errno. The next call tries again, at most once a second, until it succeeds.
 *
 * cffi reads this file too (build_engine.py): only plain declarations and integer #defines.
 */
#pragma once
#include <stdint.h>

typedef struct x3_image x3_image;

/* x3_open: flags */
#define X3_READ_ONLY 1

/* x3_open: debug. Most bits turn off one rule of the journal, so that tests can show its purpose. */
#define X3_NO_HOLD 1     /* freed blocks can be reused at once */
#define X3_NO_FORGET 2   /* blocks that are still in the log can become data without a checkpoint */
#define X3_NO_BARRIER 4  /* no barrier before the commit record */
#define X3_NO_ORPHANS 8  /* no orphan list */
#define X3_NO_MEMORY 32  /* simulate: no memory for data that the disk has refused */
#define X3_AS_NFS 64     /* simulate: the image is on NFS */
#define X3_GIVE_BACK 128 /* simulate: the image is sparse */
#define X3_EARLY 256     /* freed blocks become holes before their transaction is on disk */
#define X3_OTHER_BOOT 16 /* simulate: the machine has rebooted since the image was last open */

/* x3_inject: kind */
#define X3_PWRITE 1
#define X3_FDATASYNC 2
#define X3_PREAD 3
#define X3_FALLOCATE 4 /* allocation of a block on the disk */

/* The trace: little-endian records of u64 kind, u64 offset, u64 length, then length bytes. */
#define X3_TRACE_WRITE 1   /* these bytes were written at offset */
#define X3_TRACE_BARRIER 2 /* fdatasync returned; offset: its number */
#define X3_TRACE_MARK 3    /* x3_mark; offset: its argument */
#define X3_TRACE_BEGUN \
	4                 /* fdatasync is about to begin; offset: its number. Earlier writes are on disk if there is an
                              X3_TRACE_BARRIER with that number. */
#define X3_TRACE_FAILED 5 /* fdatasync failed: writes since the last successful one may never reach the disk */

/* x3_setattr: what to set */
#define X3_MODE 1
#define X3_UID 2
#define X3_GID 4
#define X3_ATIME 8
#define X3_MTIME 16

/* x3_rename: flags */
#define X3_EXCHANGE 1 /* swap the two names */
#define X3_WHITEOUT 2 /* leave a character device 0:0 at the source */
#define X3_KEEP 4     /* the replaced inode is in use: x3_release frees it */

#define X3_LINK_MAX 65000 /* most names of a file, and subdirectories + 2 of a directory, as in fs/ext4; then EMLINK */

/*
 * The attributes of an inode. Times are nanoseconds since the epoch, from 1901 to 2446. From 2262 on they wrap around,
 * by 2^64, to values before 1901.
 */
struct x3_attr {
	uint32_t mode, nlink, uid, gid;
	uint32_t major, minor; /* of a device */
	uint32_t generation;   /* part of the kernel's file handle */
	uint32_t flags;        /* i_flags as on disk */
	uint64_t size;
	uint64_t blocks; /* of 512 bytes */
	int64_t atime_ns, mtime_ns, ctime_ns;
};

/* Facts about the whole image. */
struct x3_facts {
	uint32_t block_size, inode_size;
	uint32_t compat, incompat, ro_compat; /* the feature bits, as they were at open */
	uint32_t state;                       /* s_state at open: 1 clean, 2 has errors */
	uint64_t blocks, free_blocks;         /* free_blocks includes blocks that are held back */
	uint64_t reserved;                    /* free blocks that the superblock reserves for root */
	uint64_t overhead;                    /* blocks that statfs does not count in f_blocks */
	uint32_t inodes, free_inodes;
	uint32_t journal_blocks, journal_used;
	uint32_t tid, committed;           /* the running transaction, and the last one on disk */
	uint32_t aborted;                  /* the errno that aborted the image, or 0 */
	uint32_t dirty;                    /* metadata blocks in the running transaction */
	uint32_t stalled;                  /* the errno that stalled the image, or 0 */
	uint32_t unsaved;                  /* blocks of metadata, and of refused data, that are only in memory */
	int64_t saved_ns;                  /* when everything was last on disk, since the epoch */
	uint64_t missing, disk_free;       /* bytes: holes of the image's file; free space of its disk */
	uint64_t cached, held;             /* blocks in the cache; free blocks that wait for a commit or checkpoint */
	uint64_t cache_hits, cache_misses; /* lookups of metadata blocks that were in the cache, and that were not */
	uint64_t commits, checkpoints, barriers, bytes_written; /* since open */
	uint64_t replayed, redone; /* transactions of the journal and records of the redo log recovered at open */
	uint8_t uuid[16];
};

/* The place of a name in its directory: logical block, and offset in it. */
struct x3_place {
	uint32_t block, offset;
};

/* The arguments and results of x3_create. */
struct x3_new {
	/* in */
	uint32_t mode, uid, gid; /* the mode with its type */
	uint32_t major, minor;   /* of a device */
	const char *target;      /* of a symlink */
	uint32_t target_len;
	const char *attrs; /* extended attributes, each: lengths of name and value (32 bits each), name, value */
	uint64_t attrs_size;
	/* out */
	uint32_t ino;
	struct x3_place place;
	struct x3_attr attr;
};

/* The arguments and results of x3_copy: a regular file or a directory, with all its attributes. */
struct x3_copy {
	/* in */
	uint32_t mode, uid, gid; /* the mode with its type */
	int64_t atime_ns, mtime_ns;
	const char *data;  /* NULL for a file without data, which is one hole */
	uint64_t size;     /* 0 for a directory */
	const char *attrs; /* as in x3_new */
	uint64_t attrs_size;
	/* out */
	uint32_t ino;
	struct x3_place place;
};

struct x3_rename {
	/* in */
	uint32_t source_dir, target_dir;
	const char *source_name, *target_name;
	uint32_t source_len, target_len;
	struct x3_place source_place;
	struct x3_place target_place; /* if an inode is replaced or exchanged */
	uint32_t ino;                 /* the moved inode */
	uint32_t replaced;            /* the inode at the target, 0 for none */
	uint32_t hint;                /* if there is none: as for x3_create */
	uint32_t flags;               /* X3_EXCHANGE, X3_WHITEOUT, X3_KEEP */
	uint32_t uid, gid;            /* of the whiteout */
	/* out */
	struct x3_place place; /* of the target's name; a name that stays at the source keeps its place */
	uint32_t whiteout;     /* the inode of the whiteout, or 0 */
};


/* --- opening and closing --- */

/*
 * Open the image behind *fd*, which is duplicated, and store it in *out*.
 *
 * The cache holds about *cache_bytes* (0: 64 MiB) of metadata. File data is only in the page cache. *trace_fd* (also
 * duplicated) gets a record of every write and barrier; -1 for none. *debug* is 0 except in tests.
 *
 * Transactions that a crash left in the journal are recovered, whatever the flag needs_recovery says. A read-only image
 * reads them from the journal and writes nothing. Otherwise they are first written home, and inodes on the orphan list
 * are deleted or truncated. (If another driver has mounted the filesystem since, and ignored the journal, the log is
 * emptied instead.)
 *
 * EOPNOTSUPP: a feature that ext3 does not have, or no internal journal. EINVAL: no ext filesystem, or an invalid
 * superblock. EBADMSG: the journal or the orphan list is damaged. After a failure, x3_message(NULL) says why, in the
 * same thread.
 */
int x3_open(int fd, uint32_t flags, uint64_t cache_bytes, int trace_fd, uint32_t debug, x3_image **out);

/*
 * Commit, free the inodes on the orphan list, write everything home, and mark the filesystem clean.
 *
 * Frees the image even if it fails. No other thread may use the image.
 */
int x3_close(x3_image *img);

/* Free the image without writing anything, as if the process had died. No other thread may use the image. */
void x3_abandon(x3_image *img);

int x3_facts(x3_image *img, struct x3_facts *out);

/* Copy up to *room* numbers of inodes that have lost data, because the disk refused it; return how many. */
uint32_t x3_lost(x3_image *img, uint32_t *inodes, uint32_t room);

/* What aborted the image, or the last error, as a sentence. Valid until the next call. NULL: see x3_open. */
const char *x3_message(x3_image *img);


/* --- inodes --- */

/* ESTALE: the inode is not in use. */
int x3_getattr(x3_image *img, uint32_t ino, struct x3_attr *out);

/*
 * The same for the inode of a name in *dir*. EUCLEAN for a directory whose ".." is not *dir*: with a directory in two
 * places, a walk through the tree might never end.
 */
int x3_child(x3_image *img, uint32_t dir, uint32_t ino, struct x3_attr *out);

/*
 * For each of *count* inodes with a name in *dir*, store its mode and its generation in *out*, if these are all that a
 * lookup needs to know; else two zeros. They are all for a directory, and for a regular file or symbolic link with one
 * name, without extended attributes and times after 2262, that is neither immutable nor append-only. Inode 0, and one
 * that cannot be read, get zeros.
 */
void x3_plain(x3_image *img, uint32_t dir, const uint32_t *inodes, uint32_t count, uint32_t *out);

/*
 * Set the fields of *attr* that the bits of *what* select, and the ctime to now.
 *
 * Only the lowest 12 bits of the mode are used. Times outside of the inode's range are clamped.
 */
int x3_setattr(x3_image *img, uint32_t ino, uint32_t what, const struct x3_attr *attr);
/*
 * Return 1 if a change of the inode has no further consequences, else 0: it is a regular file with one name, without
 * set-ID bits, ACLs and attributes of the namespace "security", and neither immutable nor append-only.
 */
int x3_is_simple(x3_image *img, uint32_t ino);
/* The same as x3_setattr for such an inode; then fill *attr* as x3_getattr does. EOPNOTSUPP for others. */
int x3_setattr_simple(x3_image *img, uint32_t ino, uint32_t what, struct x3_attr *attr);
/* Set the atime to now, if the kernel would with relatime, or *always*; never with the flag A of chattr(1). */
int x3_was_read(x3_image *img, uint32_t ino, int always);

/*
 * Set the flags of chattr(1) in i_flags, as FS_IOC_SETFLAGS of the kernel's ext3 does. The engine's own flags stay as
 * they are. The caller checks permissions, and enforces the flags. EOPNOTSUPP for flags that ext3 does not have, EINVAL
 * for extents.
 */
int x3_setflags(x3_image *img, uint32_t ino, uint32_t flags);

/* Return 1 and the birth time in *ns*; 0 if the inode has no space for it, as inodes of 128 bytes. */
int x3_birth(x3_image *img, uint32_t ino, int64_t *ns);

/* Copy the target into *buf* and return its length. ERANGE if *cap* is less; EINVAL if it is not a symlink. */
int64_t x3_readlink(x3_image *img, uint32_t ino, void *buf, uint64_t cap);


/* --- directories --- */

/*
 * Fill *buf* with the names of the next whole blocks of *dir*; return the number of bytes, 0 at the end.
 *
 * *cursor* is the block to begin at, first 0; it is advanced. Each name is u32 ino, u32 block, u16 offset, u8 type (of
 * the directory entry, EXT2_FT_*, 0 for unknown), u8 length, and the name, little-endian, without padding. "." and ".."
 * are left out. ERANGE if *cap* is less than four times the block size. ENOTDIR.
 */
int64_t x3_readdir(x3_image *img, uint32_t dir, uint64_t *cursor, void *buf, uint64_t cap);

/* The result of x3_lookup. */
struct x3_found {
	uint32_t ino, type; /* type: of the directory entry, EXT2_FT_*, 0 for unknown */
	struct x3_place place;
};

/*
 * Find a name with the directory's index, without reading the rest; return 1 if it exists, else 0. ENOTDIR; EFBIG for a
 * directory of more than 64 MiB without an index.
 */
int x3_lookup(x3_image *img, uint32_t dir, const char *name, uint32_t len, struct x3_found *out);

/* Return the inode number of the directory that contains *dir*, from its "..". ENOTDIR. */
int64_t x3_parent(x3_image *img, uint32_t dir);

/*
 * Return 1 if *ino* is *dir* or above it, following "..", else 0. EUCLEAN if the way up does not reach the root. Takes
 * at most twice as many steps as there are directories on the way.
 */
int x3_is_above(x3_image *img, uint32_t ino, uint32_t dir);

/*
 * Make an inode of any type, including directories, and give it a name in *dir*.
 *
 * *hint* is the first block of *dir* to search for space: the place of the last new name, or of a name removed before
 * it; 0 to search all. (An indexed directory needs no hint.) EMLINK; ENAMETOOLONG for names longer than 255 bytes, and
 * for targets that do not fit into a block. See x3_new.
 */
int x3_create(x3_image *img, uint32_t dir, const char *name, uint32_t len, uint32_t hint, struct x3_new *new_inode);

/*
 * Make a regular file with data and attributes, or an empty directory with attributes, in one atomic step, and give it
 * a name in *dir*. The mtime of *dir* does not change. The inode inherits nothing. *hint* is as for x3_create.
 */
int x3_copy(x3_image *img, uint32_t dir, const char *name, uint32_t len, uint32_t hint, struct x3_copy *copy);

/*
 * Give *ino* another name. EMLINK; EPERM for a directory.
 *
 * A kept orphan, which may be a directory, gets a first name, and leaves the orphan list.
 */
int x3_link(x3_image *img, uint32_t ino, uint32_t dir, const char *name, uint32_t len, uint32_t hint,
	    struct x3_place *place);

/*
 * Remove the name of *ino* at *where*.
 *
 * If the name has moved (an index may have split its block), it is searched for. With its last name, the inode is
 * freed. If *keep*, it stays on the orphan list instead, until x3_release, x3_close, or the recovery after a crash.
 * Return 1 in that case, else 0. ENOENT; EISDIR.
 */
int x3_unlink(x3_image *img, uint32_t dir, const char *name, uint32_t len, struct x3_place where, uint32_t ino,
	      int keep);

/* The same for an empty directory. ENOTEMPTY; ENOTDIR. */
int x3_rmdir(x3_image *img, uint32_t dir, const char *name, uint32_t len, struct x3_place where, uint32_t ino,
	     int keep);

/*
 * Move a name, as renameat2(2) does.
 *
 * A replaced inode must have a matching type (EISDIR, ENOTDIR); a replaced directory must be empty (ENOTEMPTY). Source
 * and target must differ, and not be names of one inode. Return 1 if the replaced inode is kept as an orphan, else 0.
 */
int x3_rename(x3_image *img, struct x3_rename *how);

/* Free *ino* if it is a kept orphan: nobody uses it any more. Otherwise do nothing. */
int x3_release(x3_image *img, uint32_t ino);


/* --- the data of regular files --- */

/* Read up to *len* bytes at *off*; fewer only at the end of the file. The atime does not change. */
int64_t x3_read(x3_image *img, uint32_t ino, void *buf, uint64_t len, uint64_t off);

/*
 * Write *len* bytes at *off*; return how many were written: fewer if there was no more space.
 *
 * The data is then in the page cache of the image's file. It is on disk before the commit that makes it part of the
 * file. EFBIG, ENOSPC if nothing was written.
 */
int64_t x3_write(x3_image *img, uint32_t ino, const void *buf, uint64_t len, uint64_t off);

/*
 * Write only to the holes in a range. Other blocks, the size and the times stay as they are.
 *
 * *off* is a multiple of the block size. The last block is padded with zeros. Nothing is written behind the end of the
 * file. Each block either has its whole new content, also on disk, or is still a hole. Returns and fails as x3_write.
 */
int64_t x3_fill(x3_image *img, uint32_t ino, const void *buf, uint64_t len, uint64_t off);

/* Set the size in bytes. A big file is freed in several transactions; recovery after a crash completes it. EFBIG. */
int x3_truncate(x3_image *img, uint32_t ino, uint64_t size);

/*
 * Make a range a hole, as fallocate(2) with FALLOC_FL_PUNCH_HOLE: free its blocks, and zero its part of other blocks.
 * The size does not change. A large range takes several transactions; a crash may leave a part of it as it was.
 */
int x3_punch(x3_image *img, uint32_t ino, uint64_t off, uint64_t len);

/* The largest size, in bytes, that a file in this image can have. Does not block. */
uint64_t x3_size_max(const x3_image *img);

/*
 * Find the next run of data at or behind *from*: return its start, and store its end in *stop*, or a position from
 * which to continue if the file has very many pieces. ENXIO if there is none.
 */
int64_t x3_segment(x3_image *img, uint32_t ino, uint64_t from, uint64_t *stop);


/* --- extended attributes: full names (user.x, trusted.x, security.x, system.posix_acl_*) as xattr(7) --- */

/* Copy the names, each with a NUL, into *buf*; return the number of bytes. With *cap* 0, only count. ERANGE. */
int64_t x3_listxattr(x3_image *img, uint32_t ino, void *buf, uint64_t cap);

/* Copy the value into *buf*; return its length. With *cap* 0, only return the length. ENODATA, ERANGE, EOPNOTSUPP. */
int64_t x3_getxattr(x3_image *img, uint32_t ino, const char *name, uint32_t len, void *buf, uint64_t cap);

/*
 * Set an attribute; *flags*: 1 XATTR_CREATE (EEXIST), 2 XATTR_REPLACE (ENODATA).
 *
 * ENOSPC: all attributes together do not fit into the inode and one block. EOPNOTSUPP: an unknown namespace. ERANGE: a
 * name longer than 255 bytes. EINVAL: no name after the namespace, or an invalid ACL. An ACL does not change the mode.
 */
int x3_setxattr(x3_image *img, uint32_t ino, const char *name, uint32_t len, const void *value, uint64_t size,
		int flags);

/* Remove an attribute. ENODATA. */
int x3_removexattr(x3_image *img, uint32_t ino, const char *name, uint32_t len);


/* --- durability --- */

/*
 * Block until *ino*, its data and its new names are on disk.
 *
 * If the inode has no uncommitted changes (with *datasync*: none except of its times), this is one fdatasync of the
 * image. Otherwise it is a commit, shared with all threads that wait at the same time; and both, if the data was
 * written during that commit.
 */
int x3_fsync(x3_image *img, uint32_t ino, int datasync);

/* Block until all changes made before are on disk. Operations continue meanwhile. */
int x3_commit(x3_image *img);

/*
 * Set whether this thread is in a hurry, for all images. Its operations then do not wait for a commit that makes freed
 * blocks usable, but fail with EAGAIN. After that, and before a change if *x3_pressed() is not 0, another thread must
 * call x3_relieve() (*for_blocks*: after an EAGAIN), which blocks; then the operation can be tried again.
 */
int x3_hurry(int on); /* returns the previous setting */
const volatile uint32_t *x3_pressed(x3_image *img);
int x3_relieve(x3_image *img, int for_blocks);

/* Commit, and write everything in the journal home. The journal is empty then, unless others write. Blocks. */
int x3_checkpoint(x3_image *img);

/* Free the cached blocks that can be read again. */
void x3_shrink(x3_image *img);

/* Whether a directory and its names are on disk, so that x3_fsync() of it has nothing to do. Does not block for I/O. */
int x3_directory_is_synced(x3_image *img, uint32_t ino);

/*
 * Whether x3_fsync() is likely to take less than 1.5 ms: there is less than a MiB to write, and the last ones took as
 * little, as a moving average. Does not block.
 */
int x3_is_quick_to_sync(x3_image *img);

/* Return 1 if there are uncommitted changes, else 0. */
int x3_dirty(x3_image *img);

/*
 * Wait until it is time to commit: *ms* milliseconds, or less if something that a commit frees becomes scarce. Return
 * whether there are uncommitted changes. x3_wake ends the present wait, or the next one if nobody waits.
 */
int x3_wait(x3_image *img, int64_t ms);
void x3_wake(x3_image *img);

/*
 * Between these two calls, no transaction ends. So the changes of all threads in between reach the disk together or not
 * at all. The calls can be nested. Make only a few changes in between. The thread must not call a function that waits
 * for a commit, and ENOSPC may come earlier.
 */
void x3_begin(x3_image *img);
void x3_end(x3_image *img);

/*
 * Mark the filesystem clean and release it, so that another program can change it, for example grow it.
 *
 * All other calls wait, in all threads, until x3_resume, which reads the filesystem again (from *fd*, which is
 * duplicated, unless it is -1). Kept orphans stay on the orphan list: to survive e2fsck, they need names. If x3_resume
 * fails, with the errors of x3_open, all further calls fail with EIO.
 */
int x3_suspend(x3_image *img);
int x3_resume(x3_image *img, int fd);

/*
 * Start or stop recording which MiB of the image's file are written to.
 *
 * x3_tracked copies numbers of MiBs written since the last call into *units*, which has space for *cap*, at least 64,
 * and returns how many; 0 if there are no others. They are removed from the record, so read the data after the call.
 * EFBIG if the image was written beyond the largest size of an ext3 with usual blocks.
 */
int x3_track(x3_image *img, int on);
int64_t x3_tracked(x3_image *img, uint32_t *units, uint64_t cap);

/*
 * Continue with another descriptor, which is duplicated.
 *
 * Its file must be an identical copy, made after x3_checkpoint. EBUSY if the image has changed since.
 */
int x3_switch(x3_image *img, int fd);


/* --- for tests --- */

/* Write an X3_TRACE_MARK record with the number *n*. */
int x3_mark(x3_image *img, uint64_t n);

/*
 * Let the *nth* (1: the next) system call of *kind* on the image fail with *error*, once or, if *sticky*, from then on.
 * *nth* 0 ends it. If *error* is 0, that call waits for the next x3_inject; an fdatasync has then begun.
 */
int x3_inject(x3_image *img, int kind, int64_t nth, int error, int sticky);
