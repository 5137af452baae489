//! A disk that forgets: for each file what is durable and what was only written, for each directory which names are.
//!
//! What it assumes, which is less than any journalling file system promises:
//! - A sync of a file makes its bytes and its length durable, not its name.
//! - A sync of a directory makes its names durable, not what the files hold.
//! - Without a sync, any of the sectors written may be there or not, in any order, and so may a change of length. Names of
//!   one directory come and go in order; those of different directories do not wait for each other.
//! - A sector is there whole or not; the last write may in addition end at any byte.

use super::{Random, Step};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// What a disk writes whole.
pub const SECTOR_BYTES: usize = 512;
const ROOT: usize = 0;

/// Files and directories by path; `None` is a directory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Image(pub BTreeMap<PathBuf, Option<Arc<Vec<u8>>>>);

impl Image {
    /// What a directory holds.
    pub fn of(dir: &Path) -> Self {
        fn walk(image: &mut Image, root: &Path, dir: &Path) {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(root).unwrap().to_owned();
                if path.is_dir() {
                    image.0.insert(name, None);
                    walk(image, root, &path);
                } else {
                    image.0.insert(name, Some(Arc::new(std::fs::read(&path).unwrap())));
                }
            }
        }
        let mut image = Self::default();
        walk(&mut image, dir, dir);
        image
    }

    /// Makes a directory hold this and nothing else.
    pub fn lay_down(&self, dir: &Path) {
        if dir.exists() {
            std::fs::remove_dir_all(dir).unwrap();
        }
        std::fs::create_dir_all(dir).unwrap();
        for (name, content) in &self.0 {
            let path = dir.join(name);
            match content {
                None => std::fs::create_dir_all(path).unwrap(),
                Some(bytes) => {
                    let file = std::fs::File::create(path).unwrap();
                    file.set_len(bytes.len() as u64).unwrap();
                    // Zeros stay a hole, as they were.
                    for (n, piece) in bytes.chunks(4096).enumerate() {
                        if piece.iter().any(|&b| b != 0) {
                            std::os::unix::fs::FileExt::write_all_at(&file, piece, n as u64 * 4096).unwrap();
                        }
                    }
                }
            }
        }
    }

    /// A number that tells images apart.
    pub fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for (name, content) in &self.0 {
            name.hash(&mut hasher);
            let Some(bytes) = content else { continue };
            bytes.len().hash(&mut hasher);
            let used = bytes.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
            hasher.write(&bytes[..used]);
        }
        hasher.finish()
    }
}

/// What is left after a cut of the power.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Only what was synced.
    Synced,
    /// Everything that was written: also what a kill of the process leaves.
    Everything,
    /// All bytes, but of names only the synced ones.
    BytesOnly,
    /// All names, but of bytes only the synced ones.
    NamesOnly,
    /// Everything, but of the last write only so many bytes.
    Torn(usize),
    /// A part of what was not synced, by this seed.
    Some(u64),
}

#[derive(Clone, Debug)]
enum Change {
    Write { at: usize, bytes: Arc<[u8]> },
    SetLength(usize),
}

fn change(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write { at, bytes: new } => {
            if bytes.len() < at + new.len() {
                bytes.resize(at + new.len(), 0);
            }
            bytes[*at..at + new.len()].copy_from_slice(new);
        }
        Change::SetLength(length) => bytes.resize(*length, 0),
    }
}

type Names = BTreeMap<PathBuf, usize>;

#[derive(Clone, Debug)]
enum Node {
    File {
        durable: Arc<Vec<u8>>,
        live: Vec<u8>,
        pending: Vec<Change>,
    },
    /// `pending`: the names after each change that is not durable yet.
    Dir {
        durable: Names,
        live: Names,
        pending: Vec<Names>,
    },
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Volume {
    nodes: Vec<Node>,
    /// The file of the last write.
    last_written: usize,
}

impl Volume {
    /// Everything in it durable.
    pub fn holding(image: &Image) -> Self {
        let mut volume = Self {
            nodes: vec![Node::Dir { durable: Names::new(), live: Names::new(), pending: Vec::new() }],
            last_written: ROOT,
        };
        for (path, content) in &image.0 {
            match content {
                None => volume.make_dir(path),
                Some(bytes) => {
                    let node = Node::File { durable: Arc::clone(bytes), live: bytes.to_vec(), pending: Vec::new() };
                    volume.add(path, node);
                }
            }
        }
        for node in &mut volume.nodes {
            if let Node::Dir { durable, live, pending } = node {
                durable.clone_from(live);
                pending.clear();
            }
        }
        volume
    }

    /// By the name it has now.
    pub fn find(&self, path: &Path) -> Option<usize> {
        path.components().try_fold(ROOT, |at, part| match (&self.nodes[at], part) {
            (Node::Dir { live, .. }, Component::Normal(name)) => live.get(Path::new(name)).copied(),
            _ => None,
        })
    }

    fn names(&mut self, dir: &Path) -> (&mut Names, &mut Vec<Names>) {
        let inode = self.find(dir).unwrap_or_else(|| panic!("there is no directory {}", dir.display()));
        match &mut self.nodes[inode] {
            Node::Dir { live, pending, .. } => (live, pending),
            Node::File { .. } => panic!("{} is no directory", dir.display()),
        }
    }

    fn rename_in(&mut self, dir: &Path, edit: impl FnOnce(&mut Names)) {
        let (live, pending) = self.names(dir);
        edit(live);
        pending.push(live.clone());
    }

    fn add(&mut self, path: &Path, node: Node) {
        let inode = self.nodes.len();
        self.nodes.push(node);
        let name = path.file_name().unwrap().into();
        self.rename_in(path.parent().unwrap(), |names| {
            names.insert(name, inode);
        });
    }

    fn make_dir(&mut self, path: &Path) {
        if path.as_os_str().is_empty() || self.find(path).is_some() {
            return;
        }
        self.make_dir(path.parent().unwrap());
        self.add(path, Node::Dir { durable: Names::new(), live: Names::new(), pending: Vec::new() });
    }

    /// As the running system sees it.
    pub fn content(&self, inode: usize) -> &[u8] {
        match &self.nodes[inode] {
            Node::File { live, .. } => live,
            Node::Dir { .. } => &[],
        }
    }

    /// Bytes in a file.
    pub fn length(&self, inode: usize) -> u64 {
        self.content(inode).len() as u64
    }

    /// Files of this name, with their paths.
    pub fn files_named(&self, name: &str) -> Vec<(PathBuf, usize)> {
        fn walk(volume: &Volume, dir: usize, at: &Path, name: &str, found: &mut Vec<(PathBuf, usize)>) {
            let Node::Dir { live, .. } = &volume.nodes[dir] else { return };
            for (entry, &inode) in live {
                if matches!(volume.nodes[inode], Node::Dir { .. }) {
                    walk(volume, inode, &at.join(entry), name, found);
                } else if entry == Path::new(name) {
                    found.push((at.join(entry), inode));
                }
            }
        }
        let mut found = Vec::new();
        walk(self, ROOT, Path::new(""), name, &mut found);
        found
    }

    fn write(&mut self, inode: usize, new: Change) {
        if let Node::File { live, pending, .. } = &mut self.nodes[inode] {
            change(live, &new);
            pending.push(new);
        }
    }

    /// Does a step.
    pub fn apply(&mut self, step: &Step) {
        match step {
            Step::Create(path) => match self.find(path) {
                Some(inode) => self.write(inode, Change::SetLength(0)),
                None => self.add(path, Node::File { durable: Arc::default(), live: Vec::new(), pending: Vec::new() }),
            },
            Step::CreateDir(path) => self.make_dir(path),
            Step::Rename { from, to } => {
                let (from_name, to_name) = (PathBuf::from(from.file_name().unwrap()), to.file_name().unwrap().into());
                assert_eq!(from.parent(), to.parent(), "nothing is moved to another directory");
                self.rename_in(from.parent().unwrap(), |names| {
                    let inode = names.remove(&from_name).unwrap();
                    names.insert(to_name, inode);
                });
            }
            Step::Remove(path) => {
                let name = PathBuf::from(path.file_name().unwrap());
                self.rename_in(path.parent().unwrap(), |names| {
                    names.remove(&name);
                });
            }
            Step::RemoveDir(path) => {
                self.rename_in(path, Names::clear);
                let name = PathBuf::from(path.file_name().unwrap());
                self.rename_in(path.parent().unwrap(), |names| {
                    names.remove(&name);
                });
            }
            Step::SyncDir(path) => {
                let Some(inode) = self.find(path) else { return };
                if let Node::Dir { durable, live, pending } = &mut self.nodes[inode] {
                    durable.clone_from(live);
                    pending.clear();
                }
            }
            Step::Write { inode, at, bytes } => {
                self.last_written = *inode;
                self.write(*inode, Change::Write { at: usize::try_from(*at).unwrap(), bytes: Arc::clone(bytes) });
            }
            Step::SetLength { inode, bytes } => self.write(*inode, Change::SetLength(usize::try_from(*bytes).unwrap())),
            Step::Sync(inode) => {
                if let Node::File { durable, pending, .. } = &mut self.nodes[*inode]
                    && !pending.is_empty()
                {
                    let durable = Arc::make_mut(durable);
                    pending.drain(..).for_each(|one| change(durable, &one));
                }
            }
            Step::Forget(inode) => {
                if let Node::File { pending, .. } = &mut self.nodes[*inode] {
                    pending.clear();
                }
            }
            Step::Applied(_) | Step::Replied | Step::Kept(_) => {}
        }
    }

    /// Bytes of the last write, if it is not durable yet.
    pub fn torn_bytes(&self) -> usize {
        match &self.nodes[self.last_written] {
            Node::File { pending, .. } => pending.iter().rev().find_map(|change| match change {
                Change::Write { bytes, .. } => Some(bytes.len()),
                Change::SetLength(_) => None,
            }),
            Node::Dir { .. } => None,
        }
        .unwrap_or(0)
    }

    /// What the disk holds after a cut of the power now.
    pub fn cut(&self, cut: Cut) -> Image {
        let mut image = Image::default();
        let mut random = Random(if let Cut::Some(seed) = cut { seed } else { 0 });
        self.cut_dir(ROOT, Path::new(""), cut, &mut random, &mut image);
        image
    }

    fn cut_dir(&self, dir: usize, at: &Path, cut: Cut, random: &mut Random, image: &mut Image) {
        let Node::Dir { durable, live, pending } = &self.nodes[dir] else { return };
        let names = match cut {
            Cut::Synced | Cut::BytesOnly => durable,
            Cut::Everything | Cut::NamesOnly | Cut::Torn(_) => live,
            Cut::Some(_) => match random.below(pending.len() + 1) {
                0 => durable,
                kept => &pending[kept - 1],
            },
        };
        for (name, &inode) in names {
            let path = at.join(name);
            match &self.nodes[inode] {
                Node::Dir { .. } => {
                    image.0.insert(path.clone(), None);
                    self.cut_dir(inode, &path, cut, random, image);
                }
                Node::File { durable, live, pending } => {
                    let content = match cut {
                        Cut::Synced | Cut::NamesOnly => Arc::clone(durable),
                        _ if pending.is_empty() && matches!(cut, Cut::Some(_)) => Arc::clone(durable),
                        Cut::Torn(kept) if inode == self.last_written => Arc::new(torn(durable, pending, kept)),
                        Cut::Everything | Cut::BytesOnly | Cut::Torn(_) => Arc::new(live.clone()),
                        Cut::Some(_) => Arc::new(some(durable, pending, random)),
                    };
                    image.0.insert(path, Some(content));
                }
            }
        }
    }
}

/// Everything, but of the last write only so many bytes.
fn torn(durable: &[u8], pending: &[Change], kept: usize) -> Vec<u8> {
    let mut content = durable.to_vec();
    let last = pending.iter().rposition(|change| matches!(change, Change::Write { .. }));
    for (n, one) in pending.iter().enumerate() {
        match one {
            Change::Write { at, bytes } if Some(n) == last => {
                let kept = kept.min(bytes.len());
                change(&mut content, &Change::Write { at: *at, bytes: bytes[..kept].into() });
            }
            one => change(&mut content, one),
        }
    }
    content
}

/// Some of the sectors written, and some of the changes of length.
fn some(durable: &[u8], pending: &[Change], random: &mut Random) -> Vec<u8> {
    let mut content = durable.to_vec();
    for one in pending {
        match one {
            Change::Write { at, bytes } => {
                let mut from = 0;
                while from < bytes.len() {
                    let to = ((at + from) / SECTOR_BYTES * SECTOR_BYTES + SECTOR_BYTES - at).min(bytes.len());
                    if random.is_lucky() {
                        change(&mut content, &Change::Write { at: at + from, bytes: bytes[from..to].into() });
                    }
                    from = to;
                }
            }
            Change::SetLength(_) => {
                if random.is_lucky() {
                    change(&mut content, one);
                }
            }
        }
    }
    content
}
