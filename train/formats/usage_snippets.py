"""Usage snippets: five lines of Python that load each format without this project. A test executes them."""

# path: an upright image of 8 bits per sample, without transparency. {mode}: Pillow's name for its channels.
USAGE_SNIPPETS = {
    "keras": """import keras, numpy, PIL.Image
model = keras.models.load_model("model.keras")
image = numpy.atleast_3d(PIL.Image.open(path).convert("{mode}"))
probabilities = model.predict(image[None], verbose=0)[0]
print(open("classes.txt").read().splitlines()[probabilities.argmax()], probabilities.max())
""",
    "saved_model": """import tensorflow as tf
model = tf.saved_model.load("saved_model")
answer = model.signatures["encoded"](encoded=tf.constant([open(path, "rb").read()]))
probabilities, classes = answer["probabilities"].numpy()[0], answer["classes"].numpy()[0]
print(classes[probabilities.argmax()].decode(), probabilities.max())
""",
    "onnx": """import json, numpy, onnxruntime, PIL.Image
session = onnxruntime.InferenceSession("model.onnx")
image = numpy.atleast_3d(PIL.Image.open(path).convert("{mode}"))
probabilities = session.run(["probabilities"], {{"images": image[None]}})[0][0]
print(json.loads(session.get_modelmeta().custom_metadata_map["classes"])[probabilities.argmax()], probabilities.max())
""",
    "tflite": """import numpy, PIL.Image; from ai_edge_litert.interpreter import Interpreter
model, image = Interpreter("model.tflite"), numpy.atleast_3d(PIL.Image.open(path).convert("{mode}"))
model.resize_tensor_input(0, (1, *image.shape)); model.allocate_tensors(); model.set_tensor(0, image[None])
model.invoke(); probabilities = model.get_tensor(model.get_output_details()[0]["index"])[0]
print(open("classes.txt").read().splitlines()[probabilities.argmax()], probabilities.max())
""",
}
RUNTIME_PACKAGES = {
    "keras": "keras tensorflow pillow",
    "saved_model": "tensorflow",
    "onnx": "onnxruntime pillow",
    "tflite": "ai-edge-litert pillow",
}


def usage_snippet(name: str, channels: int) -> str:
    """Returns the snippet of a format, for a network of 1 or 3 channels."""
    return USAGE_SNIPPETS[name].format(mode="L" if channels == 1 else "RGB")
