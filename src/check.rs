//! `kiss-vdb check`: is a data directory whole, and what is in it?
//!
//! It opens the directory as a start would, so what a start refuses, this refuses, with file and offset; a torn tail of the
//! log is cut off as by a start. Then every row is held against its checksum, which a start does not do, and every graph is
//! finished and looked through: see [`crate::vector::validate`].

use crate::engine::Paths;
use crate::engine::linker::Background;
use crate::engine::recovery::recover;
use crate::error::Error;
use anyhow::ensure;
use clap::Args;
use std::io::Write;
use std::path::PathBuf;

/// Flags of `kiss-vdb check`.
#[derive(Args, Clone, Debug)]
pub struct CheckArgs {
    /// The data directory; no server may be using it
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// Checks and prints; an error when something is wrong.
pub fn run(args: &CheckArgs) -> anyhow::Result<()> {
    let dir = args.dir.display();
    ensure!(args.dir.exists(), "there is no directory {dir}");
    ensure!(
        args.dir.join("log").is_dir(),
        "{dir} is not a data directory of KISS VDB: it holds no folder log; name the DATA_DIR of a server"
    );
    let recovered = recover(Some(&Paths::below(&args.dir)), u64::MAX, &Background::new());
    let recovered = recovered.map_err(|error| match error {
        Error::Foreign { .. } => error.into(),
        other => anyhow::Error::from(other).context(format!("{dir} cannot be opened")),
    })?;
    let state = &recovered.state;
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "revision {} · {} keys · {} collections",
        state.revision(),
        state.key_counts().0,
        state.collections().len()
    )?;
    let mut faults = Vec::new();
    for (name, collection) in state.collections() {
        let damaged = collection.damaged_rows()?;
        if !damaged.is_empty() {
            let ids: Vec<_> = damaged.iter().take(5).map(|id| id.as_str()).collect();
            faults.push(format!(
                "{}: rows.f32 in {} is damaged: the numbers of {} vectors do not match their checksums ({}{}); write them again, or restore a copy",
                name.as_str(),
                collection.dir().map_or_else(String::new, |dir| dir.display().to_string()),
                damaged.len(),
                ids.join(", "),
                if damaged.len() > ids.len() { ", …" } else { "" }
            ));
        }
        collection.settle();
        let (count, spec) = (collection.read(|c| c.len()), collection.spec());
        write!(out, "{} · {count} vectors of {} · {}", name.as_str(), spec.dim, spec.metric.as_str())?;
        match collection.validate() {
            None => writeln!(out, " · no graph")?,
            Some(report) if report.is_sound() => {
                writeln!(out, " · graph of {} with {} links, sound", report.linked, report.links)?;
            }
            Some(report) => {
                writeln!(out, " · graph NOT sound")?;
                let [doubled, dangling, unreachable, lost] =
                    [&report.doubled, &report.dangling, &report.unreachable, &report.lost].map(Vec::len);
                faults.push(format!(
                    "{}: {doubled} slots with doubled links, {dangling} with links to freed slots, {unreachable} unreachable, {lost} not found by their own vector; remove graph.bin in {} to have it made anew",
                    name.as_str(),
                    collection.dir().map_or_else(String::new, |dir| dir.display().to_string())
                ));
            }
        }
    }
    out.flush()?;
    ensure!(faults.is_empty(), "{}", faults.join("\n"));
    Ok(())
}
