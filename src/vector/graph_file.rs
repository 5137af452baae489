//! `graph.bin`: which slots were linked, what lived in each, and where its links led. A hint: without it, or with one that
//! is old or damaged, the graph is linked anew, which takes time and loses nothing.
//!
//! Header, then frames of nodes, each with length and CRC32C; the last frame holds no nodes and says how many there were.
//! A node names its slot and the revision its vector was born at: if something else lives there now, the node only tells
//! where it led, and links to it are repaired. The rows are not in it: they are made from `rows.f32` again, which is
//! faster than reading them would be.
//!
//! Written beside, synced, renamed. While it is written the graph changes on; each list is one that was true at some
//! time, and a reader trusts none of it beyond what the slots say.

use super::CollectionSpec;
use super::graph::{Graph, Pass, Scratch};
use super::nodes::LINKS_MAX;
use super::storage::{HEADER_BYTES, header};
use crate::disk::{self, File};
use crate::error::Error;
use crate::revision::Revision;
use crate::wire::{Malformed, Put, Reader};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"KISSGRPH";
const VERSION: u32 = 1;

/// A graph file in memory.
#[derive(Debug)]
pub struct GraphFile {
    /// By slot: the revision its vector was born at, and where its links begin and end in `links`.
    nodes: Vec<Option<(Revision, u32, u32)>>,
    links: Vec<u32>,
}

fn path_in(dir: &Path) -> PathBuf {
    dir.join("graph.bin")
}

fn put_frame(file: &mut impl Write, body: &[u8]) -> std::io::Result<()> {
    let mut head = Vec::with_capacity(8);
    head.put_u32(u32::try_from(body.len()).expect("a frame holds a few thousand nodes"));
    head.put_u32(crc32c::crc32c(body));
    file.write_all(&head)?;
    file.write_all(body)
}

/// Writes the file anew. `slices` yields the live linked slots, a few thousand at a time.
pub fn write(
    dir: &Path,
    spec: CollectionSpec,
    created: Revision,
    graph: &Graph,
    slices: impl Iterator<Item = Vec<(u32, Revision)>>,
) -> Result<(), Error> {
    let path = path_in(dir);
    let beside = path.with_extension("bin.tmp");
    let write = || -> std::io::Result<()> {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(&beside)?);
        file.write_all(&header(MAGIC, VERSION, spec, created))?;
        let mut count = 0;
        let mut links = Vec::with_capacity(LINKS_MAX);
        for slots in slices.filter(|slots| !slots.is_empty()) {
            let mut body = Vec::new();
            // The cast: a slice holds a few thousand.
            body.put_u32(slots.len() as u32);
            for (slot, born) in &slots {
                links.clear();
                links.extend(graph.nodes().neighbours(*slot));
                body.put_u32(*slot);
                body.put_revision(*born);
                // The cast: at most LINKS_MAX.
                body.put_u32(links.len() as u32);
                links.iter().for_each(|&to| body.put_u32(to));
            }
            put_frame(&mut file, &body)?;
            count += slots.len() as u64;
        }
        let mut last = Vec::new();
        last.put_u32(0);
        last.put_u64(count);
        put_frame(&mut file, &last)?;
        let file = file.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        file.sync()?;
        disk::rename(&beside, &path)?;
        disk::sync_dir(dir)
    };
    write().map_err(Error::io("cannot write", &path))
}

impl GraphFile {
    /// Reads the file of a collection; `None` when there is none.
    pub fn read(dir: &Path, spec: CollectionSpec, created: Revision) -> Result<Option<Self>, Error> {
        let path = path_in(dir);
        let mut bytes = Vec::new();
        match File::open(&path).and_then(|mut file| file.read_to_end(&mut bytes)) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("cannot read", &path)(error)),
        }
        Self::decode(&bytes, &header(MAGIC, VERSION, spec, created))
            .map(Some)
            .map_err(|(at, malformed)| Error::corrupt(&path, at as u64, malformed.0))
    }

    fn decode(bytes: &[u8], expected: &[u8]) -> Result<Self, (usize, Malformed)> {
        if bytes.get(..HEADER_BYTES) != Some(expected) {
            return Err((0, Malformed("it belongs to another collection or version".into())));
        }
        let mut file = Self { nodes: Vec::new(), links: Vec::new() };
        let mut reader = Reader(&bytes[HEADER_BYTES..]);
        let mut count = 0;
        loop {
            let at = bytes.len() - reader.0.len();
            let fault = |malformed| (at, malformed);
            let length = reader.u32("length").map_err(fault)?;
            let crc = reader.u32("checksum").map_err(fault)?;
            let body = reader.take(length as usize, "frame").map_err(fault)?;
            if crc32c::crc32c(body) != crc {
                return Err((at, Malformed("the checksum does not match".into())));
            }
            let mut body = Reader(body);
            let in_frame = body.u32("count").map_err(fault)?;
            if in_frame == 0 {
                let total = body.u64("total").map_err(fault)?;
                return if total == count { Ok(file) } else { Err((at, Malformed("frames are missing".into()))) };
            }
            for _ in 0..in_frame {
                file.take_node(&mut body).map_err(fault)?;
            }
            count += u64::from(in_frame);
        }
    }

    fn take_node(&mut self, body: &mut Reader<'_>) -> Result<(), Malformed> {
        let slot = body.u32("slot")? as usize;
        let born = body.revision("born")?;
        let count = body.u32("links")? as usize;
        let bytes = body.take(count * size_of::<u32>(), "links")?;
        // Slots come in order, so a wild one would be a damaged file that its checksum did not show.
        if count > LINKS_MAX || slot < self.nodes.len() || slot >= 1 << 28 {
            return Err(Malformed(format!("slot {slot} with {count} links")));
        }
        self.nodes.resize(slot + 1, None);
        let place = |at: usize| u32::try_from(at).map_err(|_| Malformed("more links than a file holds".into()));
        let start = place(self.links.len())?;
        self.links.extend(bytes.as_chunks::<4>().0.iter().map(|&link| u32::from_le_bytes(link)));
        self.nodes[slot] = Some((born, start, place(self.links.len())?));
        Ok(())
    }

    /// One more than the largest slot.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.nodes.len()
    }

    /// What lived in a slot when it was written.
    #[must_use]
    pub fn born(&self, slot: u32) -> Option<Revision> {
        (*self.nodes.get(slot as usize)?).map(|(born, ..)| born)
    }

    fn links(&self, slot: u32) -> &[u32] {
        let node = self.nodes.get(slot as usize).copied().flatten();
        node.map_or(&[], |(_, start, end)| &self.links[start as usize..end as usize])
    }

    /// Links those slots of a graph that still hold what they held, and around those that do not. Their rows are written,
    /// and nobody else has the graph.
    pub fn restore(&self, graph: &Graph, known: &[(u32, Revision)]) {
        let mut is_known = vec![false; self.slots()];
        for &(slot, _) in known {
            is_known[slot as usize] = true;
        }
        let is_stale = |slot: u32| is_known.get(slot as usize) != Some(&true);
        Pass::new(known.len()).run(|piece, ()| {
            known[piece].iter().for_each(|&(slot, _)| graph.nodes().set_links(slot, self.links(slot)));
        });
        let leads_on = |gone: u32, visit: &mut dyn FnMut(u32)| self.links(gone).iter().copied().for_each(visit);
        Pass::new(known.len()).run(|piece, scratch: &mut Scratch| {
            known[piece].iter().for_each(|&(slot, _)| graph.repair_with(slot, is_stale, leads_on, scratch));
        });
        let slots: Vec<u32> = known.iter().map(|&(slot, _)| slot).collect();
        graph.choose_entries(&slots);
    }
}
