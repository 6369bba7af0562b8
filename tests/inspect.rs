//! Inspected generations: the same as others, with what happened at each step.

use candle_generate::{GenerationConfig, Generator, Step};
use std::path::Path;

fn storyteller() -> Generator {
    Generator::from_pretrained(Path::new("examples/models/storyteller")).unwrap()
}

fn effect<'a>(step: &'a Step, processor: &str) -> &'a candle_generate::Effect {
    step.effects.iter().find(|effect| effect.processor == processor).unwrap()
}

#[test]
fn looking_on_changes_nothing() {
    let generator = storyteller();
    let config = GenerationConfig::sampling().temperature(0.8).top_k(20).repetition_penalty(1.3).num_return_sequences(2);
    let config = config.max_new_tokens(12).seed(5).log_probs(3).output_logits(true).output_scores(true);
    let (plain, inspected) = (generator.generate("The", &config).unwrap(), generator.inspect("The", &config).unwrap());
    for (plain, inspected) in plain.sequences.iter().zip(&inspected.sequences) {
        assert_eq!((&plain.tokens, &plain.logits, &plain.scores), (&inspected.tokens, &inspected.logits, &inspected.scores));
        assert!(plain.steps.is_none());
        let (steps, log_probs) = (inspected.steps.as_ref().unwrap(), inspected.log_probs.as_ref().unwrap());
        assert_eq!(steps.iter().map(|step| step.token).collect::<Vec<_>>(), inspected.tokens);
        for (step, log_prob) in steps.iter().zip(log_probs) {
            assert!((step.prob - log_prob.log_prob.exp()).abs() < 1e-6);
            assert!(step.top.len() >= 3 && step.top.is_sorted_by(|a, b| a.prob >= b.prob));
            assert!(step.processed > 0.0 && step.top.iter().all(|candidate| candidate.processed <= 1.0));
            let names: Vec<_> = step.effects.iter().map(|effect| effect.processor.as_str()).collect();
            assert_eq!(names, ["repetition_penalty", "temperature", "top_k"], "the processors did all there is");
            assert_eq!(effect(step, "top_k").removed, 2048 - 20);
            assert_eq!(effect(step, "top_k").likeliest.len(), 5);
        }
    }
    assert!(inspected.beams.is_empty());
}

#[test]
fn a_processor_that_changes_the_choice_says_so() {
    let generator = storyteller();
    let greedy = GenerationConfig::greedy().max_new_tokens(1);
    let first = generator.generate("Once upon a time", &greedy).unwrap().tokens()[0];
    let output = generator.inspect("Once upon a time", &greedy.suppress_tokens(vec![first])).unwrap();
    let step = &output.sequences[0].steps.as_ref().unwrap()[0];
    assert_eq!(effect(step, "suppress_tokens").top, Some(step.token));
    assert_eq!(effect(step, "suppress_tokens").likeliest[0].0, first);
    assert!(step.top[0].token == first && step.top[0].processed == 0.0 && step.top.len() == 9, "the best 8 of both");
    let json = serde_json::to_value(&output).unwrap();
    assert_eq!(json["sequences"][0]["steps"][0]["effects"][0]["removed"], 1);
    assert_eq!(json["sequences"][0]["finish"], "length");
}

#[test]
fn what_beams_return_is_a_path_of_their_tree() {
    let generator = storyteller();
    let settings = [
        GenerationConfig::beam(4).num_return_sequences(3).length_penalty(0.0),
        GenerationConfig::new().num_beams(4).do_sample(true).seed(3).num_return_sequences(2),
        GenerationConfig::new().num_beams(4).num_beam_groups(2).diversity_penalty(1.5).num_return_sequences(4),
    ];
    for config in settings {
        let config = config.max_new_tokens(8).repetition_penalty(1.2);
        let output = generator.inspect("Good", &config).unwrap();
        assert!(generator.generate("Good", &config).unwrap().beams.is_empty());
        for sequence in &output.sequences {
            let last = sequence.tokens.len() - 1;
            let mut ended = output.beams[last].iter().filter(|beam| beam.beam.is_none() && Some(beam.score) == sequence.score);
            let mut beam = ended.next().unwrap();
            for step in (0..=last).rev() {
                assert_eq!((beam.token, beam.parent), (sequence.tokens[step], sequence.beam_indices.as_ref().unwrap()[step]));
                assert_eq!(sequence.steps.as_ref().unwrap()[step].token, beam.token);
                if step > 0 {
                    beam = output.beams[step - 1].iter().find(|other| other.beam == Some(beam.parent)).unwrap();
                }
            }
            let effects = &sequence.steps.as_ref().unwrap()[0].effects;
            assert!(effects.iter().all(|effect| effect.processor != "beam"), "the processors did all there is: {effects:?}");
        }
    }
}
