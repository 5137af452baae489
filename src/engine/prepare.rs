//! The I/O that records need before they are applied: files for new collections, room for new vectors. Done by commit, before the
//! log is written, and by recovery; `State::apply` itself then cannot fail.

use super::codec::Event;
use super::collections::SharedCollection;
use super::linker::Background;
use super::snapshot;
use super::state::State;
use crate::error::Error;
use crate::revision::Revision;
use crate::vector::CollectionName;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

/// See the module.
#[derive(Debug)]
pub struct Preparer {
    vectors: Option<PathBuf>,
    background: Arc<Background>,
    created: Vec<(CollectionName, Arc<SharedCollection>)>,
    /// Vectors prepared for and not yet applied, by the collection's creating revision.
    pending: HashMap<Revision, usize>,
}

impl Preparer {
    /// `None` prepares collections in memory.
    #[must_use]
    pub fn new(vectors: Option<PathBuf>, background: &Arc<Background>) -> Self {
        Self { vectors, background: Arc::clone(background), created: Vec::new(), pending: HashMap::new() }
    }

    /// Prepares for a record. What `state` already shows needs nothing. After an error nothing is prepared for it.
    pub fn prepare(&mut self, state: &State, first_revision: Revision, events: &[Event]) -> Result<(), Error> {
        let created_before = self.created.len();
        let mut added = Vec::new();
        let result = self.prepare_events(state, first_revision, events, &mut added);
        if result.is_err() {
            self.created.drain(created_before..).for_each(|(_, collection)| remove_files(&collection));
            // Or what was refused would be asked for again and again, and added up.
            added.into_iter().for_each(|(created, count)| *self.pending.entry(created).or_default() -= count);
        }
        result
    }

    /// `added` gets what was added to `pending`.
    fn prepare_events(
        &mut self,
        state: &State,
        first_revision: Revision,
        events: &[Event],
        added: &mut Vec<(Revision, usize)>,
    ) -> Result<(), Error> {
        let mut revision = first_revision;
        let mut events = events.iter().peekable();
        while let Some(event) = events.next() {
            match event {
                Event::CollectionCreated { collection, spec } if revision > state.revision() => {
                    let files = SharedCollection::open(self.vectors.as_deref(), *spec, revision, &self.background)?;
                    self.created.push((collection.clone(), files));
                }
                Event::VectorWritten { collection, vector: Some(_), .. } => {
                    // Mostly all that follow go there too: room is made for them together.
                    let mut count = 1;
                    let is_one_more = |next: &&Event| {
                        let is_write = matches!(next, Event::VectorWritten { vector: Some(_), .. });
                        is_write && next.vector_collection() == Some(collection)
                    };
                    while events.next_if(is_one_more).is_some() {
                        count += 1;
                    }
                    revision = revision.plus(count as u64 - 1);
                    let created = self.created.iter().rev().find(|(name, _)| name == collection).map(|(_, c)| c);
                    if let Some(collection) = created.or_else(|| state.collections().get(collection)) {
                        let pending = self.pending.entry(collection.created()).or_insert(0);
                        *pending += count;
                        added.push((collection.created(), count));
                        collection.reserve(*pending)?;
                    }
                }
                _ => {}
            }
            revision = revision.next();
        }
        Ok(())
    }

    /// Gives the prepared collections to the state, right before their records are applied.
    pub fn hand_over(&mut self, state: &mut State) {
        for (_, collection) in self.created.drain(..) {
            state.prepare(collection);
        }
        self.pending.clear();
    }

    /// Gives up what was prepared for records that will not be applied. The files go with the next start at the latest.
    pub fn give_up(&mut self) {
        self.created.drain(..).for_each(|(_, collection)| remove_files(&collection));
        self.pending.clear();
    }
}

fn remove_files(collection: &SharedCollection) {
    if let Some(dir) = collection.dir() {
        // If this fails, the next start removes what no collection owns.
        snapshot::remove_collection(dir).ok();
    }
}
