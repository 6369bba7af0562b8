//! How ids become vectors that know where they stand: what an encoder or decoder does before its layers.

use super::{
    layers::Loader,
    rope::Rotation,
    spec::{DecoderSpec, Positions, Projection, Waves},
};
use crate::{
    error::Result,
    kernels::{Matrix, Norm, Ops},
    model::Context,
};
use candle_core::DType;
use std::{ops::Range, sync::Arc};

/// What happens between a table of embeddings and the first layer.
pub(crate) struct Entry<O: Ops> {
    scale: Option<f32>,
    /// From the width of the embeddings to that of the layers.
    inward: Option<O::Weight>,
    norm: Option<Norm<O::Vector>>,
    positions: Place<O>,
}

/// How tokens are told where they stand.
enum Place<O: Ops> {
    /// With the number of its vectors that are not used.
    Table(O::Weight, usize),
    /// Computed as they are needed, with the width of a vector.
    Waves(Waves, usize),
    /// Rotations, and which of them a layer has.
    Rope(Vec<Rotation>, Vec<Option<usize>>),
    /// The attention's biases tell.
    Biases,
}

/// Where the tokens of a row stand.
pub(crate) struct Row {
    pub positions: Range<usize>,
    /// The length that decides how they are rotated.
    pub reach: usize,
}

impl<O: Ops> Entry<O> {
    /// Loads it, and tells how far its positions reach.
    pub fn load(loader: &mut Loader<'_, O>, spec: &DecoderSpec) -> Result<(Self, Context)> {
        let norm = spec.embedding_norm.map(|name| loader.norm(name)).transpose()?;
        let inward = match spec.projection {
            Some(Projection { width, inward, .. }) => Some(loader.matrix(inward, spec.hidden, width, None)?),
            None => None,
        };
        let (positions, context) = match &spec.positions {
            &Positions::Learned { name, skip, len } => {
                (Place::Table(loader.matrix(name, skip + len, spec.hidden, None)?, skip), Context::Hard(len))
            }
            &Positions::Waves { waves, stored, trained } => {
                let place = match stored.filter(|name| loader.has(name)) {
                    Some(name) => Place::Table(loader.matrix(name, trained, spec.hidden, None)?, 0),
                    None => Place::Waves(waves, spec.hidden),
                };
                (place, if waves == Waves::Plain { Context::Hard(trained) } else { Context::Soft(trained) })
            }
            Positions::Rope { rotations, layers, trained } => (Place::Rope(rotations.clone(), layers.clone()), Context::Soft(*trained)),
            Positions::Alibi { trained } => (Place::Biases, trained.map_or(Context::Unlimited, Context::Soft)),
            Positions::Relative { .. } => (Place::Biases, Context::Unlimited),
        };
        Ok((Self { scale: spec.embedding_scale, inward, norm, positions }, context))
    }

    /// The tokens of a pass as vectors, and the angles of each rotation.
    pub fn embed(&self, ops: &O, table: &O::Weight, ids: &[u32], rows: &[Row]) -> Result<(O::Act, Vec<O::Angles>)> {
        let x = ops.embed(table, ids)?;
        let x = match self.scale {
            Some(scale) => ops.scale(x, scale)?,
            None => x,
        };
        let x = match &self.inward {
            Some(inward) => ops.linear(None, inward, &x)?,
            None => x,
        };
        let positions = rows.iter().flat_map(|row| row.positions.clone());
        let x = match &self.positions {
            Place::Table(table, skip) => {
                let places: Vec<u32> = positions.map(|position| (skip + position) as u32).collect();
                ops.add(x, &ops.embed(table, &places)?)?
            }
            Place::Waves(waves, width) => {
                let values: Vec<u8> = positions.flat_map(|position| waves.at(position, *width)).flat_map(f32::to_le_bytes).collect();
                let table = Matrix { bytes: &values, dtype: DType::F32, outputs: ids.len(), inputs: *width, transposed: false };
                let places: Vec<u32> = (0..ids.len() as u32).collect();
                ops.add(x, &ops.embed(&ops.weight(&[table], None, &|_| ())?, &places)?)?
            }
            Place::Rope(..) | Place::Biases => x,
        };
        let x = match &self.norm {
            Some(norm) => ops.norm(norm, &x)?,
            None => x,
        };
        match &self.positions {
            Place::Rope(rotations, _) => {
                let angles = |rotation: &Rotation| {
                    let ropes: Vec<_> = rows.iter().map(|row| rotation.at(row.reach)).collect();
                    let turns: Vec<_> = ropes.iter().zip(rows).map(|(rope, row)| (&**rope, row.positions.clone())).collect();
                    ops.angles(&turns)
                };
                Ok((x, rotations.iter().map(angles).collect::<Result<_>>()?))
            }
            Place::Table(..) | Place::Waves(..) | Place::Biases => Ok((x, Vec::new())),
        }
    }

    /// Which rotation a layer has.
    pub fn rotation(&self, layer: usize) -> Option<usize> {
        match &self.positions {
            Place::Rope(_, layers) => layers.get(layer).copied().flatten(),
            Place::Table(..) | Place::Waves(..) | Place::Biases => None,
        }
    }

    /// Lengths past which all tokens of a row are rotated otherwise.
    pub fn crossings(&self) -> Arc<[usize]> {
        match &self.positions {
            Place::Rope(rotations, _) => rotations.iter().filter_map(Rotation::crossing).collect(),
            Place::Table(..) | Place::Waves(..) | Place::Biases => Arc::default(),
        }
    }

    /// The length past which tokens stay rotated as they were written.
    pub fn steady(&self) -> usize {
        match &self.positions {
            Place::Rope(rotations, _) => rotations.iter().map(Rotation::steady).min().unwrap_or(usize::MAX),
            Place::Table(..) | Place::Waves(..) | Place::Biases => usize::MAX,
        }
    }
}

impl Waves {
    /// The vector of a position, of an even `width`.
    fn at(self, position: usize, width: usize) -> impl Iterator<Item = f32> {
        let half = width / 2;
        // HF: Marian's and Pegasus's angles are computed in f64, those of M2M-100 in f32.
        let angle = move |pair: usize| match self {
            Self::Plain => position as f64 / 10_000f64.powf(2.0 * pair as f64 / width as f64),
            Self::Fairseq { skip } => {
                let step = (10_000f64.ln() / (half.max(2) - 1) as f64) as f32;
                let frequency = f64::from(pair as f32 * -step).exp() as f32;
                f64::from((skip + position) as f32 * frequency)
            }
        };
        (0..half).map(move |pair| angle(pair).sin() as f32).chain((0..half).map(move |pair| angle(pair).cos() as f32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn close(waves: Waves, position: usize, expected: [f32; 6]) {
        let found: Vec<f32> = waves.at(position, 6).collect();
        assert!(found.len() == 6 && found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 2e-7), "{found:?} is not {expected:?}");
    }

    #[test]
    fn waves_are_the_references() {
        close(Waves::Plain, 0, [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
        close(Waves::Plain, 50, [-0.262_374_85, 0.731_690_17, 0.107_513_525, 0.964_966, -0.681_637_35, 0.994_203_6]);
        let fairseq = Waves::Fairseq { skip: 2 };
        close(fairseq, 1, [0.141_12, 0.029_995_5, 0.000_299_999_96, -0.989_992_5, 0.999_550_04, 0.999_999_94]);
        close(fairseq, 50, [0.986_627_6, 0.496_880_1, 0.005_199_976_3, -0.162_990_78, 0.867_819_2, 0.999_986_5]);
        close(fairseq, 1000, [0.167_266_55, -0.560_692_2, 0.100_032_404, -0.985_911_7, -0.828_024_27, 0.994_984_15]);
    }
}
