//! `export`: everything as lines of JSON, page by page.

use super::backup::is_stream;
use super::key::Page;
use super::output::{Output, Partial};
use super::{ServerFlags, get, path, query, usage};
use crate::client::Client;
use crate::engine::json::push_string;
use anyhow::Context;
use clap::{Args, ValueEnum};
use std::io::Write;
use std::path::PathBuf;

/// Flags of `kiss-vdb export`.
#[derive(Args, Debug)]
#[command(
    after_help = "A key is a line {\"key\":…,\"value\":…}; a collection {\"collection\":…,\"dim\":…,\"metric\":…}, followed by its vectors \
{\"collection\":…,\"id\":…,\"vector\":[…],\"meta\":{…}}. Read back by import. Each page is of one revision, the whole is not: for a \
consistent copy see backup.

Examples:
  kiss-vdb export > everything.ndjson
  kiss-vdb export state --prefix job: | jq -c .value
  kiss-vdb export vectors docs --output docs.ndjson"
)]
pub struct ExportArgs {
    /// What
    #[arg(value_enum, default_value_t = What::All)]
    what: What,
    /// Which collection's vectors; without, all of them
    #[arg(value_parser = super::collection)]
    collection: Option<String>,
    /// Keys that begin with this
    #[arg(long, default_value = "", hide_default_value = true)]
    prefix: String,
    /// A file instead of stdout (-); it is there when it is whole
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Replace the file if it exists
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    pub(super) server: ServerFlags,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    State,
    Vectors,
    All,
}

/// Where lines go.
enum Sink {
    Stdout(Output),
    File(Partial),
}

impl Sink {
    fn line(&mut self, line: &str) -> std::io::Result<()> {
        match self {
            Self::Stdout(out) => out.line(line),
            Self::File(file) => file.write_all(line.as_bytes()).and_then(|()| file.write_all(b"\n")),
        }
    }
}

/// `kiss-vdb export`
pub async fn export(args: ExportArgs) -> anyhow::Result<()> {
    if args.collection.is_some() && args.what != What::Vectors {
        return Err(usage("a collection goes with: export vectors COLLECTION"));
    }
    let mut client = args.server.client()?;
    let mut sink = match &args.output {
        Some(path) if !is_stream(path) => Sink::File(Partial::create(path, args.force)?),
        _ => Sink::Stdout(Output::new()),
    };
    let mut lines = 0u64;
    if args.what != What::Vectors {
        lines += pages(&mut client, &mut sink, "/v1/state", &[("prefix", &args.prefix)], "{").await?;
    }
    if args.what != What::State {
        for name in collections(&mut client, args.collection.as_deref()).await? {
            lines += vectors(&mut client, &mut sink, &name).await?;
        }
    }
    match sink {
        Sink::Stdout(mut out) => out.flush()?,
        Sink::File(file) => {
            file.finish()?;
            eprintln!("{lines} rows");
        }
    }
    Ok(())
}

async fn collections(client: &mut Client, one: Option<&str>) -> anyhow::Result<Vec<String>> {
    if let Some(name) = one {
        return Ok(vec![name.to_owned()]);
    }
    let answer = get(client, "/v1/vector").await?.json()?;
    let all = answer["collections"].as_array().context("an answer without collections")?;
    Ok(all.iter().filter_map(|c| c["collection"].as_str().map(str::to_owned)).collect())
}

async fn vectors(client: &mut Client, sink: &mut Sink, name: &str) -> anyhow::Result<u64> {
    let route = path("/v1/vector/", name);
    let info = get(client, &route).await?.json()?;
    let mut begin = String::from("{\"collection\":");
    push_string(&mut begin, name);
    begin.push(',');
    sink.line(&format!("{begin}\"dim\":{},\"metric\":{}}}", info["dim"], info["metric"]))?;
    Ok(1 + pages(client, sink, &format!("{route}/list"), &[("include_vector", "true")], &begin).await?)
}

/// Writes the items of all pages, each with its opening brace replaced by `begin`.
async fn pages(
    client: &mut Client,
    sink: &mut Sink,
    route: &str,
    parameters: &[(&str, &str)],
    begin: &str,
) -> anyhow::Result<u64> {
    let mut lines = 0;
    let mut cursor = None;
    loop {
        let fixed = parameters.iter().map(|(name, value)| (*name, Some((*value).to_owned())));
        let query = query(fixed.chain([("limit", Some("1000".to_owned())), ("cursor", cursor)]));
        let answer = get(client, &format!("{route}{query}")).await?;
        let page: Page<'_> = serde_json::from_slice(&answer.body).context("an answer that is no list")?;
        for item in &page.items {
            let rest = item.get().strip_prefix('{').context("an item that is no object")?;
            sink.line(&format!("{begin}{rest}"))?;
        }
        lines += page.items.len() as u64;
        cursor = page.next_cursor;
        if cursor.is_none() {
            return Ok(lines);
        }
    }
}
