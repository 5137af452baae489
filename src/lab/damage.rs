//! Damaged files: every byte of a small data directory changed, cut off, overwritten; files swapped, doubled, removed.
//!
//! What would break: a start that shows something else than what was acknowledged, without a word. It either shows all of it,
//! numbers of vectors included, or is refused with the file's name.

use super::power::{Found, look};
use super::volume::{Cut, Image, Volume};
use super::workload::{self, Model, Oracle, Settings};
use super::{Recorder, Step, scratch, seeds, within};
use crate::faults::Bug;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Zeros behind the last byte of a file that are tried one by one; further ones only here and there.
const TAIL_BYTES: usize = 40;

/// A data directory and what it must show.
struct Specimen {
    image: Image,
    oracle: Oracle,
    /// Stopped in order: then a snapshot vouches for all of the log.
    is_stopped: bool,
}

fn specimen(seed: u64, is_stopped: bool) -> Specimen {
    specimen_with(seed, is_stopped, None)
}

fn specimen_with(seed: u64, is_stopped: bool, bug: Option<Bug>) -> Specimen {
    let dir = scratch();
    let settings = Settings { seed, fsync: "always", waits: false };
    let recorder = Recorder::new(dir.path(), &Image::default(), None);
    let oracle = within(Some(&recorder), bug, || workload::run(dir.path(), settings, &recorder)).unwrap();
    let mut steps = recorder.steps();
    if !is_stopped {
        steps.truncate(1 + steps.iter().rposition(|step| matches!(step, Step::Replied)).unwrap());
    }
    let mut volume = Volume::holding(&Image::default());
    steps.iter().for_each(|step| volume.apply(step));
    Specimen { image: volume.cut(Cut::Everything), oracle, is_stopped }
}

/// A change of one file.
#[derive(Clone, Debug)]
enum Damage {
    Flip(usize, u8),
    Cut(usize),
    Zero(Range<usize>),
}

impl Damage {
    fn of(&self, bytes: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        match self {
            Self::Flip(at, bit) => bytes[*at] ^= 1 << bit,
            Self::Cut(at) => bytes.truncate(*at),
            Self::Zero(range) => bytes[range.clone()].fill(0),
        }
        bytes
    }

    fn range(&self) -> Range<usize> {
        match self {
            Self::Flip(at, _) => *at..at + 1,
            Self::Cut(at) => *at..usize::MAX,
            Self::Zero(range) => range.clone(),
        }
    }

    /// All that are tried on a file.
    fn all(bytes: &[u8]) -> Vec<Self> {
        let used = bytes.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
        let near = (used + TAIL_BYTES).min(bytes.len());
        let places = || (0..near).chain((near..bytes.len()).step_by(509));
        let mut all: Vec<_> = places().map(|at| Self::Flip(at, (at % 8) as u8)).collect();
        // A segment that is shorter than it was created is refused wherever it ends.
        all.extend(places().step_by(if bytes.starts_with(b"KISSVLOG") { 101 } else { 1 }).map(Self::Cut));
        for length in [8, 64, 512] {
            let starts = (0..used).step_by(length);
            all.extend(starts.map(|at| Self::Zero(at..(at + length).min(bytes.len()))));
        }
        all.retain(|damage| damage.of(bytes) != bytes);
        all
    }
}

/// Newest revision in each record's frame, and where the frame ends.
fn records(segment: &[u8]) -> Vec<(u64, usize)> {
    let number = |at: usize| u64::from_le_bytes(segment[at..at + 8].try_into().unwrap());
    let mut found = Vec::new();
    let mut at = 64;
    while at + 32 <= segment.len() && segment[at + 20] != 0 {
        let end = at + (32 + (number(at) & 0xffff_ffff) as usize).next_multiple_of(8);
        if segment[at + 20] == 1 {
            found.push((number(at + 8) + (number(at + 16) & 0xffff_ffff) - 1, end));
        }
        at = end;
    }
    found
}

#[derive(Debug, Default)]
struct Counts {
    cases: usize,
    refused: usize,
    /// All is there: the damage was in what is not needed, or is mended.
    complete: usize,
    /// The end of the last batches before a kill, which nothing vouched for yet.
    torn: usize,
}

impl Specimen {
    /// The newest revision that must survive a damage. The end of the log of a server that was killed looks like a torn tail
    /// when the last frame, which nothing vouches for, is hit.
    fn floor(&self, name: &Path, damage: Option<&Damage>) -> u64 {
        let newest = self.oracle.newest().0;
        let is_last = self.segments().last() == Some(&name);
        let (Some(damage), true, false) = (damage, is_last, self.is_stopped) else { return newest };
        let records = records(self.image.0[name].as_ref().unwrap());
        let hit = damage.range();
        let last_begins = records.iter().rev().nth(1).map_or(64, |(_, end)| *end);
        if hit.end <= last_begins {
            return newest;
        }
        let before = records.iter().filter(|(_, end)| *end <= hit.start).map(|(revision, _)| *revision).max();
        before.unwrap_or(0)
    }

    fn segments(&self) -> Vec<&Path> {
        self.image.0.keys().filter(|name| name.starts_with("log")).skip(1).map(PathBuf::as_path).collect()
    }

    fn judge(&self, found: &Result<Found, String>, name: &Path, floor: u64) -> Result<Verdict, String> {
        let found = match found {
            Err(said) => {
                let names = said.contains(name.to_str().unwrap()) || said.contains("damaged at offset");
                return if names { Ok(Verdict::Refused) } else { Err(format!("it only says {said}")) };
            }
            Ok(found) => found,
        };
        let newest = self.oracle.newest().0;
        if found.last < floor {
            return Err(format!("it ends at revision {} without a word, {floor} was acknowledged", found.last));
        }
        if self.oracle.models.get(&found.last) != Some(&found.model) {
            return Err(format!("at revision {} it shows something else", found.last));
        }
        if let Some(other) = found.records.iter().find(|(first, told)| self.oracle.records.get(first) != Some(told)) {
            return Err(format!("a stream is told something else of revision {}", other.0));
        }
        Ok(if found.last == newest { Verdict::Complete } else { Verdict::Torn })
    }

    /// Every damage of every file; the first that goes unnoticed.
    fn damage_everything(&self, bug: Option<Bug>, is_tried: impl Fn(&Path) -> bool) -> Result<Counts, String> {
        let scratch = scratch();
        let dir = scratch.path().join("data");
        self.image.lay_down(&dir);
        // What the first start after a kill removes is not worth damaging; all further ones change nothing.
        look(&dir)?;
        let mut counts = Counts::default();
        for (name, content) in &Image::of(&dir).0 {
            let Some(content) = content.as_ref().filter(|_| is_tried(name)) else { continue };
            for damage in Damage::all(content) {
                let damaged = damage.of(content);
                std::fs::write(dir.join(name), &damaged).unwrap();
                let found = within(None, bug, || look(&dir));
                let verdict = self.judge(&found, name, self.floor(name, Some(&damage)));
                let verdict = verdict.map_err(|e| format!("{}, {damage:?}: {e}", name.display()))?;
                counts.add(verdict);
                let is_changed = std::fs::read(dir.join(name)).unwrap() != damaged;
                if is_changed && verdict == Verdict::Refused && !is_history(name) {
                    return Err(format!("{}, {damage:?}: refused, but changed", name.display()));
                }
                // A start changes nothing but the file it mends.
                std::fs::write(dir.join(name), content.as_slice()).unwrap();
            }
        }
        Ok(counts)
    }

    /// Files removed, swapped, doubled.
    fn mix_up_files(&self, bug: Option<Bug>) -> Result<Counts, String> {
        let scratch = scratch();
        let dir = scratch.path().join("data");
        let mut counts = Counts::default();
        let mut try_one = |what: &str, name: &Path, image: &Image| -> Result<(), String> {
            image.lay_down(&dir);
            let found = within(None, bug, || look(&dir));
            // Files that belong together tell of each other: the message may name either.
            let verdict = self.judge(&found, Path::new(""), self.oracle.newest().0);
            counts.add(verdict.map_err(|e| format!("{} {what}: {e}", name.display()))?);
            Ok(())
        };
        let files: Vec<_> = self.image.0.iter().filter_map(|(name, bytes)| Some((name, bytes.as_ref()?))).collect();
        for (name, bytes) in &files {
            let mut image = self.image.clone();
            image.0.remove(*name);
            try_one("removed", name, &image)?;
            if name.starts_with("snapshots") && is_refused(&image, &dir, bug) {
                return Err(format!("{} removed: the other one is of no use", name.display()));
            }
            for (other, others) in &files {
                if name.extension() != other.extension() || name == other || !is_checked_at_start(name) {
                    continue;
                }
                let mut image = self.image.clone();
                image.0.insert((*name).clone(), Some(Arc::clone(others)));
                try_one("replaced", name, &image)?;
                image.0.insert((*other).clone(), Some(Arc::clone(bytes)));
                try_one("swapped", name, &image)?;
            }
            if let Some(extension) = name.extension().filter(|_| name.components().count() == 2) {
                for double in [1u64, 20, 10_000] {
                    let mut image = self.image.clone();
                    let double = name.with_file_name(format!("{double:020}")).with_extension(extension);
                    if image.0.insert(double, Some(Arc::clone(bytes))).is_none() {
                        try_one("doubled", name, &image)?;
                    }
                }
            }
        }
        Ok(counts)
    }
}

/// Whether a start on an image is refused.
fn is_refused(image: &Image, dir: &Path, bug: Option<Bug>) -> bool {
    image.lay_down(dir);
    within(None, bug, || workload::recovered(dir).is_err())
}

/// Damage there may show only when history is read, after a start that mended what it may.
fn is_history(name: &Path) -> bool {
    name.starts_with("log")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Refused,
    Complete,
    Torn,
}

impl Counts {
    fn add(&mut self, verdict: Verdict) {
        self.cases += 1;
        match verdict {
            Verdict::Refused => self.refused += 1,
            Verdict::Complete => self.complete += 1,
            Verdict::Torn => self.torn += 1,
        }
    }
}

/// The checksums of rows are not looked at by a start, but by [`crate::check`].
fn is_checked_at_start(name: &Path) -> bool {
    !name.ends_with("rows.f32")
}

fn damage_all(is_stopped: bool) {
    for seed in seeds() {
        let specimen = specimen(seed, is_stopped);
        let bytes =
            specimen.damage_everything(None, is_checked_at_start).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let files = specimen.mix_up_files(None).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        println!("seed {seed}, stopped: {is_stopped}: bytes {bytes:?}, files {files:?}");
        assert!(bytes.refused > 1000 && files.refused > 5, "{bytes:?} {files:?}");
    }
}

#[test]
fn damage_to_any_byte_after_a_stop_is_refused_or_changes_nothing() {
    damage_all(true);
}

#[test]
fn damage_to_any_byte_after_a_kill_is_refused_or_changes_nothing() {
    damage_all(false);
}

/// Any bit of any live row, found by `kiss-vdb check`.
#[test]
fn damage_to_rows_is_found_by_check() {
    let specimen = specimen(1, true);
    let scratch = scratch();
    let dir = scratch.path().join("data");
    let damaged_rows = || {
        let recovered = workload::recovered(&dir).unwrap();
        let collections = recovered.state.collections().values();
        collections.map(|c| c.damaged_rows().unwrap().len()).sum::<usize>()
    };
    specimen.image.lay_down(&dir);
    assert_eq!(damaged_rows(), 0);
    let live = Model::of(&workload::recovered(&dir).unwrap().state).rows();
    let (name, rows) = specimen.image.0.iter().find(|(name, _)| name.ends_with("rows.f32")).unwrap();
    let rows = rows.as_ref().unwrap();
    let mut found = 0;
    for row in live {
        let place = rows.windows(row.len()).step_by(64).position(|window| window == row).unwrap() * 64;
        for at in place..place + row.len() {
            for bit in 0..8 {
                std::fs::write(dir.join(name), Damage::Flip(at, bit).of(rows)).unwrap();
                assert_eq!(damaged_rows(), 1, "bit {bit} of byte {at}");
                found += 1;
            }
        }
    }
    println!("{found} flipped bits found");
}

#[test]
fn the_checks_of_damage_catch_seeded_bugs() {
    let how = specimen(1, true)
        .damage_everything(Bug::named("skip_checksum"), is_checked_at_start)
        .expect_err("skip_checksum");
    println!("skip_checksum: {how}");
    let bug = Bug::named("drop_uncovered");
    let how = specimen_with(1, false, bug).mix_up_files(None).expect_err("drop_uncovered");
    println!("drop_uncovered: {how}");
}
